"""A sweep as one page: methods × models, ranks over seeds, and the way to every cell's report. Also of one that is not done."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from scipy.stats import rankdata, t

from ..bench.measuring import per_edit
from ..bench.runs import RunError
from ..bench.schema import FOUR, MEASURES, Cell, EditMetrics, Summary, from_json
from ..bench.significance import joint_interval, mean_interval, share_interval
from .tables import COLUMNS, LESS_IS_BETTER, MEMORY_MARK, ends, protocol_title, shown

#: The file of a sweep's folder that says what has become of its cells.
STATE = "sweep.json"
# What has to be said of the figures.
_NOTES = (
    "A figure is the mean over a method's runs on a model, with its 95 % interval over the edits: an edit's figure is its mean "
    "over the runs. runs: the least and the most, where they differ. The best of a model in bold.",
    "Rank 1 is the best; equal figures share a rank. A method's rank is its mean over models, data and orders, and then over "
    "seeds, with a 95 % interval by Student's t over the seeds, where there are several. A run that could make no edit has no "
    "rank.",
    "In percent, teacher-forced, but for what says otherwise; the mean is that of edit success, generalization, portability "
    "and locality. A figure, or the seed below it, leads to the run's own report.",
)
_MEMORY_NOTE = (
    f"{MEMORY_MARK} changes no weights, and keeps edits in a memory beside them: not ranked, in bold the best of the others."
)
#: By what methods are put side by side; those that no cell has are left out.
_MEASURES = ("mean", *(key for key in COLUMNS if key != "mean"))


@dataclass(frozen=True)
class Run:
    """A cell.

    Attributes:
        row: its figures, where its run is complete.
        memory: whether its method changes no weights, and keeps edits in a memory beside them.
    """

    cell: Cell
    row: Summary | None
    memory: bool = False

    @property
    def method(self) -> str:
        """The method, with the hyper-parameters that are the cell's own; marked where it changes no weights."""
        changed = [f"{key} {value}" for key, value in self.cell.overrides.items()]
        return ", ".join([self.cell.method, *changed]) + (f" {MEMORY_MARK}" if self.memory else "")

    @property
    def table(self) -> tuple[Any, ...]:
        """The table that it stands in: the data, how many edits, how they are made."""
        return self.cell.data, self.cell.size, self.cell.protocol


@dataclass(frozen=True)
class Rank:
    """A method's rank, from 1: its mean over models, data and orders, and then over seeds.

    Attributes:
        interval: 95 %, Student's t over the seeds; empty where there is one.
    """

    mean: float
    interval: Sequence[float] = ()


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / STATE).is_file()


def read_sweep(folder: Path) -> list[Run]:
    """A sweep's cells, with the rows of those that are done; methods that change no weights come last.

    Raises:
        RunError: the folder holds no sweep, or a file that cannot be read.
    """
    file = folder / STATE
    if not is_sweep(folder):
        raise RunError(f"{folder}: holds no sweep; name a folder that kdpo sweep has made")
    runs = []
    for cell in from_json(Cell, _read(file)):
        rows = from_json(Summary, _read(folder / cell.folder / "summary.json")) if cell.state == "done" else []
        runs.append(Run(cell, rows[0] if rows else None))
    done = {run.cell.method: _read(folder / run.cell.folder / "run.json") for run in _first_of_methods(runs)}
    memories = {method for method, record in done.items() if method in record["about"].get("memories", ())}
    return sorted((replace(run, memory=run.cell.method in memories) for run in runs), key=lambda run: run.memory)


def _first_of_methods(runs: Iterable[Run]) -> list[Run]:
    """Of every method, a run that is done."""
    return list({run.cell.method: run for run in runs if run.row is not None}.values())


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read: {error}") from None


def ranks(runs: Iterable[Run], measure: str) -> tuple[dict[str, Rank], int]:
    """Every method's rank, and over how many comparisons.

    A comparison is all methods on one model, data, protocol, order and seed. Those count that have all of the methods which are
    done anywhere: in others the missing ones would make the rest look better. Equal figures share a rank.

    Methods that change no weights are ranked only where there are no others. A run that could make no edit counts as not done.
    """
    comparisons: dict[tuple[Any, ...], dict[str, float]] = {}
    for run in _compared(runs):
        value = getattr(run.row, measure)
        if value is not None:
            cell = run.cell
            comparisons.setdefault((cell.seed, cell.model, *run.table, cell.order), {})[run.method] = value
    methods = list(dict.fromkeys(method for of in comparisons.values() for method in of))
    sign = 1 if measure in LESS_IS_BETTER else -1
    by_seed: dict[int, list[Any]] = {}
    for (seed, *_), of in comparisons.items():
        if of.keys() == set(methods):
            by_seed.setdefault(seed, []).append(rankdata([sign * of[method] for method in methods]))
    if not by_seed:
        return {}, 0
    of_seeds = np.array([np.mean(rows, axis=0) for rows in by_seed.values()])
    found = {}
    for method, column in zip(methods, of_seeds.T):
        interval: list[float] = []
        if len(column) > 1:
            half = t.ppf(0.975, len(column) - 1) * column.std(ddof=1) / np.sqrt(len(column))
            interval = [float(end) for end in np.clip((column.mean() - half, column.mean() + half), 1, len(methods))]
        found[method] = Rank(float(column.mean()), interval)
    return found, sum(map(len, by_seed.values()))


def _compared(runs: Iterable[Run]) -> list[Run]:
    """The runs that are held against one another."""
    runs = list(runs)
    runs = [run for run in runs if not run.memory] or runs
    return [run for run in runs if run.row is not None and not run.row.none_made]


def figures(folder: Path, runs: Sequence[Run], measures: Sequence[str]) -> dict[str, tuple[float, Sequence[float]]]:
    """The means of measures over a method's runs on one model, and their 95 % confidence intervals over the edits.

    Of several runs (seeds, orders), an edit's figure is its mean over them. What no run has is left out.
    """
    rows = [run.row for run in runs if run.row is not None]
    by_edit = _by_edit(folder, runs) if len(rows) > 1 else {}
    found = {}
    for measure in measures:
        values = [value for row in rows if (value := getattr(row, measure)) is not None]
        if values:
            interval = _interval(by_edit, measure) if len(rows) > 1 else rows[0].intervals.get(measure, ())
            found[measure] = float(np.mean(values)), interval
    return found


def _by_edit(folder: Path, runs: Sequence[Run]) -> dict[str, list[float | None]]:
    """The measures of every edit, each the mean over the runs that have it."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if run.row is None:
            continue
        file = folder / run.cell.folder / f"metrics-{run.row.method}-{run.row.protocol}.json"
        metrics = from_json(EditMetrics, _read(file))
        for measure, values in per_edit(metrics, "post").items():
            for entry, value in zip(metrics, values):
                of = found.setdefault(entry.requested_rewrite["prompt"], {}).setdefault(measure, [])
                of += [] if value is None else [value]
    measures = dict.fromkeys(measure for of in found.values() for measure in of)
    return {
        measure: [float(np.mean(of[measure])) if of.get(measure) else None for of in found.values()] for measure in measures
    }


def _interval(by_edit: Mapping[str, Sequence[float | None]], measure: str) -> Sequence[float]:
    if measure == "mean":
        return joint_interval([by_edit[key] for key in FOUR])
    values = [value for value in by_edit.get(measure, ()) if value is not None]
    if measure not in MEASURES or len(values) < 2:
        return ()
    return (mean_interval if measure == "fluency" else share_interval)(values)


# --------------------------------------------------------------------------------------------------------------------
# As it is shown.


def content(folder: Path, into: Path) -> dict[str, Any]:
    """What the page draws.

    Args:
        folder: the sweep's.
        into: where the page will lie, which its links begin from.
    """
    runs = read_sweep(folder)
    measures = [key for key in _MEASURES if any(run.row is not None and getattr(run.row, key) is not None for run in runs)]
    tables: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        tables.setdefault(run.table, []).append(run)
    first = next(iter(_first_of_methods(runs)), None)
    record = _read(folder / first.cell.folder / "run.json") if first else {"versions": {}}
    methods = list(dict.fromkeys(run.method for run in runs))
    states = Counter(run.cell.state for run in runs)
    return {
        "name": folder.resolve().name,
        "versions": record["versions"],
        "notes": [*_NOTES, *([_MEMORY_NOTE] if any(run.memory for run in runs) else [])],
        "seeds": sorted({run.cell.seed for run in runs}),
        "states": {state: states[state] for state in ("done", "running", "waiting", "failed") if states[state]},
        "measures": {key: _label(key) for key in measures},
        "methods": methods,
        "models": list(dict.fromkeys(run.cell.model for run in runs)),
        "overall": {key: _ranks(runs, key) for key in measures} if len(tables) > 1 else {},
        "tables": [_table(folder, into, of, measures) for of in tables.values()],
        "failed": [
            {"name": run.cell.name, "tries": run.cell.tries, "error": run.cell.error}
            for run in runs
            if run.cell.state == "failed"
        ],
    }


def _label(measure: str) -> str:
    heading, unit = COLUMNS[measure]
    return f"{heading} {unit}" if measure == "mean" else ", ".join(filter(None, (heading, unit)))


def _table(folder: Path, into: Path, runs: Sequence[Run], measures: Sequence[str]) -> dict[str, Any]:
    data, size, protocol = runs[0].table
    sizes = {run.row.n_edits for run in runs if run.row is not None}
    edits = sizes.pop() if len(sizes) == 1 else size or "all"
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.method, {}).setdefault(run.cell.model, []).append(run)
    cells = {
        method: {model: _group(folder, into, of, measures) for model, of in models.items()} for method, models in groups.items()
    }
    compared: dict[str, list[Mapping[str, Any]]] = {}
    for model, method in dict.fromkeys((run.cell.model, run.method) for run in _compared(runs)):
        compared.setdefault(model, []).append(cells[method][model]["figures"])
    for key in measures:
        for of_methods in compared.values():
            shown_there = [of[key] for of in of_methods if key in of]
            best = (min if key in LESS_IS_BETTER else max)((figure["value"] for figure in shown_there), default=None)
            for figure in shown_there:
                figure["best"] = figure["value"] == best
    return {
        "title": f"{'The models’ own edits' if data == 'own' else data}: {edits} {protocol_title(protocol)}",
        "cells": cells,
        "ranks": {key: _ranks(runs, key) for key in measures},
    }


def _group(folder: Path, into: Path, runs: Sequence[Run], measures: Sequence[str]) -> dict[str, Any]:
    """A method on a model: its figures, and its runs."""
    several = sum(run.row is not None for run in runs) > 1
    shown_figures = {}
    for key, (value, interval) in figures(folder, runs, measures).items():
        values = [of for run in runs if run.row is not None and (of := getattr(run.row, key)) is not None]
        least, most = shown(key, min(values)), shown(key, max(values))
        shown_figures[key] = {
            "value": value,
            "text": shown(key, value),
            "interval": ends(key, interval),
            "spread": f"{least}–{most}" if several and least != most else "",
            "best": False,
        }
    return {"figures": shown_figures, "runs": [_run(folder, into, run) for run in runs]}


def _run(folder: Path, into: Path, run: Run) -> dict[str, Any]:
    cell = run.cell
    label = f"{cell.seed}" + (f", order {cell.order}" if cell.order > 1 else "")
    there = Path(os.path.relpath((folder / cell.folder / "report.html").resolve(), into.resolve()))
    link = quote(there.as_posix()) if cell.state == "done" else None
    return {"seed": label, "state": cell.state, "link": link, "error": cell.error}


def _ranks(runs: Sequence[Run], measure: str) -> dict[str, Any]:
    found, comparisons = ranks(runs, measure)
    best = min((rank.mean for rank in found.values()), default=None)
    return {
        "comparisons": comparisons,
        "of": {
            method: {
                "text": f"{rank.mean:.2f}",
                "interval": "–".join(f"{end:.2f}" for end in rank.interval),
                "best": rank.mean == best,
            }
            for method, rank in found.items()
        },
    }
