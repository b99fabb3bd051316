"""A run's folder: what is done is on disk at once, whole, and only ever continued by the run that began it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import json_text, whole

# What a run writes, and so what ``overwrite`` removes; and what it writes of a method under a protocol.
_OURS = (
    "run.json", "summary.json", "curve.json", "tests.json", "easyedit-summary.json", "ability-before.json", "before.jsonl",
    "measuring.jsonl", "judge.jsonl", "radar.png", "curve.png", "report.html", "summary.md", "summary.tex",
    "logs/easyedit.log",
)  # fmt: skip
_OF_ROW = ("{row}.jsonl", "metrics-{row}.json", "metrics-{row}-at-*.json", "ability-{row}.json", "ability-{row}-at-*.json")


class RunError(RuntimeError):
    """A run's folder cannot be used or written; the message names it and says what to do."""


class RunFolder:
    """The folder of one run. As a context manager it is this process's alone.

    Args:
        path: made if need be.
        settings: everything the run's figures follow from, as JSON can hold it.
        overwrite: start anew where there is a run already.
        about: what is only to be read, and may change from one call to the next.
        anew: what to do, beside naming another folder, where it holds another run.

    Raises:
        RunError: on entering: another process is at work in the folder, it holds another run or something else, or it
            cannot be written.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        overwrite: bool = False,
        about: Mapping[str, Any] | None = None,
        anew: str = "start anew in this one with --overwrite",
    ) -> None:
        self.path = path
        self.anew = anew
        self.settings = json.loads(json.dumps(settings))
        self.overwrite = overwrite
        self.about = about or {}
        self._found: dict[str, Any] = {}

    def __enter__(self) -> RunFolder:
        with _told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")  # the system lets go of it however the process ends
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise RunError(f"{self.path}: another process is at work here; wait for it, or name another folder") from None
        try:
            self._claim()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _claim(self) -> None:
        record = self.path / "run.json"
        if not record.exists():
            if any(name != ".lock" and not name.endswith(".unfinished") for name in os.listdir(self.path)):
                raise RunError(f"{self.path}: the folder is not empty, and what it holds is no run; name another")
        elif self.overwrite:
            for pattern in (*_OURS, *self._of_rows()):
                for file in self.path.glob(pattern):
                    file.unlink()
        else:
            there = self.read("run.json")
            if any(self.path.glob("*.jsonl")):  # else it was given up before anything was measured
                self._check(differences(settings_in(there), self.settings))
                self._found = there.get("found", {})
        for file in self.path.glob("*.unfinished"):  # what a killed process was writing, of a model's size maybe
            file.unlink()
        self._write_record()

    def _check(self, differing: Sequence[str]) -> None:
        if differing:
            raise RunError(
                f"{self.path}: the folder holds another run: {'; '.join(differing)}. Name another folder, or {self.anew}"
            )

    def _write_record(self) -> None:
        self.write("run.json", {**self.settings, "found": self._found, "about": self.about})

    def settle(self, **found: Any) -> None:
        """Add to the settings what is known only once the model is loaded.

        Raises:
            RunError: the folder holds a run of which something else is known.
        """
        if self._found:  # a run of before has none
            self._check(differences(self._found, found))
        self._found = found
        self._write_record()

    def _of_rows(self) -> Iterator[str]:
        """What the run that is there has written of its methods; a user's own files may lie beside it."""
        try:
            there = self.read("run.json")
            rows = [(method, protocol) for method in there["methods"] for protocol in there["protocols"]]
        except (RunError, KeyError, TypeError):  # it cannot be read, or is no run's
            return
        for method, protocol in rows:
            yield from (pattern.format(row=f"{method}-{protocol}") for pattern in _OF_ROW)
            yield f"weights-{method}*.safetensors"

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file whole or not at all."""
        with _whole(self.path / name) as unfinished:
            unfinished.write_text(json_text(content, indent=1), encoding="utf-8")

    def read(self, name: str) -> Any:
        """The content of a JSON file, or None where there is none.

        Raises:
            RunError: it is no JSON.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError:
            raise RunError(f"{path}: cannot be read; start anew with --overwrite") from None

    def write_weights(self, name: str, weights: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write weights, with notes that JSON can hold, whole or not at all."""
        with _whole(self.path / name) as unfinished:
            metadata = {key: json.dumps(value) for key, value in notes.items()}
            save_file({key: weight.contiguous().cpu() for key, weight in weights.items()}, unfinished, metadata)

    def read_weights(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and notes; two empty mappings where there are none."""
        path = self.path / name
        if not path.exists():
            return {}, {}
        with safe_open(path, framework="pt") as file:
            notes = {key: json.loads(value) for key, value in file.metadata().items()}
            return {key: file.get_tensor(key) for key in file.keys()}, notes  # noqa: SIM118

    @contextmanager
    def measuring(self, what: str) -> Iterator[dict[str, float]]:
        """For a block that measures: note its seconds, and what it adds, for the costs of the run."""
        started = time.perf_counter()
        costs: dict[str, float] = {}
        yield costs
        costs["seconds"] = time.perf_counter() - started
        self.journal("measuring.jsonl").append({"what": what, **{key: round(value, 4) for key, value in costs.items()}})

    def tokens_per_second(self, what: str) -> float | None:
        """How fast answers were written in what was measured under a name; None where none were."""
        noted = [entry for entry in self.journal("measuring.jsonl").entries if entry["what"] == what]
        tokens, seconds = (sum(entry.get(key, 0) for entry in noted) for key in ("tokens", "writing"))
        return round(tokens / seconds, 1) if seconds else None

    def spent(self, rows: Iterable[tuple[str, str]]) -> dict[str, float]:
        """Seconds of ``editing``, what is made once included, and of ``measuring``, by the journals.

        Args:
            rows: methods and protocols.
        """
        edits = [entry for method, protocol in rows for entry in self.journal(f"{method}-{protocol}.jsonl").entries]
        editing = sum((entry.get("time") or 0) + (entry.get("once") or 0) for entry in edits)
        measuring = sum(entry["seconds"] for entry in self.journal("measuring.jsonl").entries)
        return {"editing": round(editing, 2), "measuring": round(measuring, 2)}

    def journal(self, name: str) -> Journal:
        """The journal of that name, with what it holds already."""
        return Journal(self.path / name)

    def adopt(self, name: str, folder: Path) -> Journal:
        """The journal of that name; where this run has none yet, as another run's folder has it."""
        if not (self.path / name).exists():
            with _whole(self.path / name) as unfinished:
                shutil.copyfile(folder / name, unfinished)
        return self.journal(name)


class Journal:
    """A file of JSON lines, each of them on disk before the next thing begins.

    Attributes:
        entries: what it holds. A last line that was cut off is none of it, and goes once another is added.

    Raises:
        RunError: a line before the last is not JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Any] = []
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        whole = 0
        for number, line in enumerate(lines[:-1]):  # what follows the last line's end was cut off
            try:
                self.entries.append(json.loads(line))
            except ValueError:
                if number < len(lines) - 2:
                    raise RunError(f"{path}: line {number + 1} cannot be read; start anew with --overwrite") from None
                break
            whole += len(line) + 1
        # Of a line that was cut off, where it begins. Reading changes nothing: another process may be writing it.
        self._cut_off = whole if lines and lines[len(self.entries) :] != [b""] else None

    def mend(self) -> None:
        """Drop a last line that was cut off."""
        if self._cut_off is not None:
            with _told(self.path):
                os.truncate(self.path, self._cut_off)
            self._cut_off = None

    def append(self, entry: Any) -> None:
        """Add a line."""
        self.mend()
        line = json_text(entry).encode() + b"\n"
        with _told(self.path), self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def cut(self, length: int) -> None:
        """Forget all but the first entries."""
        if len(self.entries) > length:
            del self.entries[length:]
            lines = self.path.read_bytes().splitlines(keepends=True)
            with _whole(self.path) as unfinished:
                unfinished.write_bytes(b"".join(lines[:length]))
            self._cut_off = None


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """For a block that writes a file: whole or not at all, and told where it cannot be."""
    with _told(path), whole(path) as unfinished:
        yield unfinished


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """For a block that writes: say what cannot be written, and why, and that what is done is kept."""
    try:
        yield
    except OSError as error:
        advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to that"
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}. What was done is kept; {advice}, and the same command goes "
            "on from there"
        ) from error


def settings_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run was begun with, in what its ``run.json`` has."""
    return {key: value for key, value in record.items() if key not in ("found", "about")}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """What differs between two settings, in words."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{where}.{key}" if where else key)]
    return [] if one == other else [f"{where} is {one!r} there and {other!r} here"]
