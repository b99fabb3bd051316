"""Which code measured something."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

from ..easyedit import host


@cache
def versions() -> dict[str, str]:
    """Of EasyEdit and of this package, with the commit or the sources' hash; of torch and transformers.

    Figures of different code are not to be put side by side without a word, and a clone of EasyEdit is its own version: it
    has no number.
    """
    easyedit, own = (Path(file).parent for file in (host.easyeditor.__file__, __file__))
    return {
        "easyeditor": f"{host.NAME}, {_commit(easyedit) or _sources(easyedit)}",
        "kdpo-easyedit": ", ".join(filter(None, (version("kdpo-easyedit"), _commit(own)))),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _commit(folder: Path) -> str:
    """The commit of a checkout, and the sources' hash where these were changed since; empty where a folder is in none, or is
    not tracked by the one that it is in."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)

    try:
        tracked = git("ls-files", "--error-unmatch", "__init__.py")
        head, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--", "*.py")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if tracked.returncode or head.returncode:
        return ""
    return f"commit {head.stdout.strip()}" + (f" and {_sources(folder)}" if changed.stdout.strip() else "")


def _sources(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return f"sources {digest.hexdigest()[:12]}"
