"""How a sweep stands, as one table: of its plan, and while it runs."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .plan import Plan
from .run import Sweep, _protocol

_ROWS = 20


def plan_table(plan: Plan) -> Table:
    """The cells of a plan, a row each, and why those are refused that are."""
    table = Table(box=None, pad_edge=False)
    keys = list(dict.fromkeys(key for cell in plan.cells for key in cell.overrides))
    for heading in ("model", "method", "data", "edits", "protocol", "seed", *keys, ""):
        table.add_column(heading)
    for cell in plan.cells:
        size = "all" if cell.size is None else str(cell.size)
        values = (str(cell.overrides.get(key, "")) for key in keys)
        refused = f"refused: {plan.refused[cell.name]}" if cell.name in plan.refused else ""
        table.add_row(cell.model, cell.method, cell.data, size, _protocol(cell), str(cell.seed), *values, refused)
    return table


class Live:
    """A table that is drawn anew from a running sweep: what waits, runs and where, is done or failed, and how long it takes."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._began = time.monotonic()
        self._lines: dict[Path, tuple[int, int]] = {}
        self._at_start: dict[str, int] = {}

    def __rich__(self) -> Group:
        sweep = self.sweep
        cells = list(sweep.cells.values())
        states = Counter(cell.state for cell in cells)
        table = Table(box=None, pad_edge=False)
        for heading in ("running", "edits", "where"):
            table.add_column(heading, justify="right" if heading == "edits" else "left")
        running = [cell for cell in cells if cell.state == "running"]
        for name in [name for name, state in sweep.shared.items() if state == "running"][:_ROWS]:
            table.add_row(name, "", "")
        for cell in running[:_ROWS]:
            table.add_row(cell.name, f"{self._made(cell.name)} of {sweep.edits[cell.name]}", cell.where)
        if len(running) > _ROWS:
            table.add_row(f"… and {len(running) - _ROWS} more", "", "")
        return Group(table, Text(f"{self._counts(states)}; {self._pace()}"))

    def _counts(self, states: Counter[str]) -> str:
        words = [f"{states[state]} {state}" for state in ("waiting", "running", "done", "failed")]
        shared = Counter(self.sweep.shared.values())
        if shared:
            words.append(f"shared work: {shared['done']} of {shared.total()} done")
        return ", ".join(words)

    def _pace(self) -> str:
        made, left = 0, 0
        for name, edits in self.sweep.edits.items():
            so_far = edits if self.sweep.cells[name].state in ("done", "failed") else self._made(name)
            made += so_far - self._at_start.setdefault(name, so_far if self.sweep.cells[name].state != "done" else 0)
            left += edits - so_far
        hours = (time.monotonic() - self._began) / 3600
        if not made:
            return f"{left} edits left"
        return f"{made / hours:.0f} edits an hour; {left} left, {_duration(left * hours / made)}"

    def _made(self, name: str) -> int:
        """How many edits of a cell are in its journal."""
        cell = self.sweep.cells[name]
        file = self.sweep.folder / cell.folder / f"{cell.method}-{_protocol(cell)}.jsonl"
        read, lines = self._lines.get(file, (0, 0))
        if file.exists():
            with file.open("rb") as journal:
                journal.seek(read)
                new = journal.read()
            self._lines[file] = read + len(new), lines + new.count(b"\n")
        return self._lines.get(file, (0, 0))[1]


def _duration(hours: float) -> str:
    minutes = round(hours * 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "less than a minute"
