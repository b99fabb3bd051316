"""Files in pieces: what a worker without the driver's disk is given, and what it sends back.

Nothing here knows of Ray: a piece is what fits into one message.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

#: The bytes of a piece, at most.
SIZE = 8 * 2**20
# A journal only grows, and is sent from where it has grown; whoever goes on cuts it to what the other files know of. A report
# says that a run is complete.
_JOURNAL, _LAST = ".jsonl", "report.html"
_NOT_SENT = (".lock", ".unfinished")


@dataclass(frozen=True)
class Piece:
    """A part of a file.

    Attributes:
        path: within the folder that is sent.
        start: where it begins in the file.
        data: its bytes.
        last: whether the file is whole with it.
    """

    path: str
    start: int
    data: bytes
    last: bool


#: Of files that were sent: their number on the disk, their time and size.
Sent = dict[str, tuple[int, int, int]]


def files_in(root: Path, path: str) -> list[Path]:
    """A file within ``root``, or those of a folder."""
    there = root / path
    files = [there] if there.is_file() else [file for file in there.rglob("*") if file.is_file()]
    return sorted(file for file in files if not file.name.endswith(_NOT_SENT))


def pieces_of(root: Path, file: Path) -> Iterator[Piece]:
    """A file in pieces."""
    with file.open("rb") as content:
        yield from _pieces(str(file.relative_to(root)), content, 0)


def changes(root: Path, folder: str, sent: Sent) -> Iterator[Piece]:
    """What has changed in a folder within ``root``, or is new; ``sent`` is kept up to date.

    Whatever has come of it when its sender is killed can be gone on from: a journal comes before the files that were written
    after its lines, such as weights, and the report after all. What comes first is opened last, and so has all that the others
    know of.
    """
    with ExitStack() as opened:
        found: list[tuple[Path, BinaryIO, int]] = []
        for file in sorted(files_in(root, folder), key=lambda file: (file.name != _LAST, file.suffix == _JOURNAL)):
            with suppress(FileNotFoundError):  # what is there for a moment only
                content = opened.enter_context(file.open("rb"))  # of a file that is replaced meanwhile, what it was
                stat = os.fstat(content.fileno())
                now, before = (stat.st_ino, stat.st_mtime_ns, stat.st_size), sent.get(str(file))
                if now != before:
                    grown = file.suffix == _JOURNAL and before is not None and before[0] == now[0] and before[2] <= now[2]
                    found.append((file, content, before[2] if grown and before else 0))
                    sent[str(file)] = now
        for changed, its, start in reversed(found):
            yield from _pieces(str(changed.relative_to(root)), its, start)


def _pieces(path: str, content: BinaryIO, start: int) -> Iterator[Piece]:
    """A file in pieces, from a place in it; as much of it as there is now."""
    size = os.fstat(content.fileno()).st_size
    content.seek(start)
    while True:
        data = content.read(min(SIZE, size - start))
        last = start + len(data) >= size
        yield Piece(path, start, data, last)
        start += len(data)
        if last:
            return


def receive(root: Path, piece: Piece) -> None:
    """Put a piece where it belongs. A file is there once it is whole; a journal grows."""
    file = root / piece.path
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == _JOURNAL and piece.start:
        with file.open("r+b") as journal:
            journal.truncate(piece.start)
            journal.seek(piece.start)
            journal.write(piece.data)
        return
    unfinished = file.with_name(file.name + ".unfinished")
    with unfinished.open("r+b" if piece.start else "wb") as content:
        content.seek(piece.start)
        content.write(piece.data)
        content.flush()
        os.fsync(content.fileno())
    if piece.last:
        unfinished.replace(file)
