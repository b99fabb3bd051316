"""Tasks for tests: in a module of their own, which workers import in no time."""

from __future__ import annotations

import os
import signal
import time

from kdpo_easyedit.sweep.tasks import Place


def square(place: Place, value: int, trouble: str = "") -> int:
    """A number's square; before it, as often as ``trouble`` says (``2 killed``), an error or the process's end."""
    tries = place.root / f"tries-{value}"
    tries.write_text(tries.read_text() + "." if tries.exists() else ".")
    times, _, how = trouble.partition(" ")
    if trouble and len(tries.read_text()) <= int(times):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(f"{value} will not do")
    time.sleep(0.1)
    return value * value
