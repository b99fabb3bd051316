"""Files that are written whole or not at all, and JSON that everything can read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """For a block that writes a file: under another name, which becomes its own once it is whole and on disk.

    The name is this process's alone: another may be writing the same file, of a cache for one.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def json_text(content: Any, **options: Any) -> str:
    """Content as JSON. Numbers that are not finite, which JSON does not have, become null."""
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(content), ensure_ascii=False, allow_nan=False, **options)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
