"""A plan → its cells' runs: what they share is done once and first, and what is done already is left alone."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..bench.inputs import Inputs
from ..bench.protocols import Method, settings_of
from ..bench.runs import RunError, RunFolder, differences, settings_in
from ..bench.schema import Cell, in_a_name, in_order, to_json
from ..bench.versions import versions
from ..easyedit.loading import loading
from ..easyedit.statistics import needs_statistics, with_text
from ..files import json_text, whole
from ..models import world
from ..report.sweep import STATE
from .plan import Plan, SweepError
from .tasks import Event, Task, Workers
from .work import CellWork, is_complete, make_statistics, measure_before, run_cell, write_inputs

# The file of a sweep's folder that says which model each short name means.
_MODELS = "models.json"
# How long the state of all cells may be written, which of thousands takes a moment: a share of the time, and seconds at once.
_SHARE, _AT_ONCE = 0.02, 1.0


@dataclass
class Sweep:
    """A plan in its folder.

    Attributes:
        cells: as they stand, by name.
        edits: how many each has.
        shared: what is done once for several cells, by the task's name: ``waiting``, ``running``, ``done`` or ``failed``.
        loads: how many models were loaded in this call.
        ended: how many cells were done or failed in this call.
    """

    plan: Plan
    folder: Path
    cells: dict[str, Cell]
    edits: dict[str, int] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    loads: int = 0
    ended: int = 0


@contextmanager
def opened(plan: Plan, folder: Path) -> Iterator[Sweep]:
    """A plan's folder, for a block this process's alone; what is done in it is seen.

    Raises:
        SweepError: a cell that cannot be run here.
        RunError: another process is at work in the folder, it holds something else, or a cell of other settings or of another
            model.
    """
    if plan.refused:
        raise SweepError(refusals(plan))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{folder}: another process is at work here; wait for it, or name another folder") from None
    try:
        if not (folder / STATE).exists() and not all(file.name.endswith((".lock", ".unfinished")) for file in folder.iterdir()):
            raise RunError(f"{folder}: the folder is not empty, and what it holds is no sweep; name another")
        sweep = Sweep(plan, folder, {cell.name: cell for cell in plan.cells})
        models = _models(sweep)
        for cell in plan.cells:
            if is_complete(folder / cell.folder):
                _check_settings(sweep, cell)
                sweep.cells[cell.name] = replace(cell, state="done")
        _write(sweep)
        with whole(folder / _MODELS) as unfinished:
            unfinished.write_text(json_text(models, indent=1), encoding="utf-8")
        try:
            yield sweep
        finally:
            _write(sweep)
    finally:
        lock.release()


def refusals(plan: Plan) -> str:
    """Which cells cannot be run, in words: a line a reason."""
    reasons: dict[str, list[Cell]] = {}
    for cell in plan.cells:
        if cell.name in plan.refused:
            reasons.setdefault(plan.refused[cell.name], []).append(cell)
    lines = [
        f"{cells[0].method} on {cells[0].model}{f' and {len(cells) - 1} more' if len(cells) > 1 else ''}: {reason}"
        for reason, cells in reasons.items()
    ]
    return "\n".join(["these cells cannot be run; take the methods from the YAML, or exclude them:", *lines])


def run(sweep: Sweep, workers: Workers) -> Iterator[Event]:
    """Run the cells that are missing. ``sweep`` is up to date whenever an event comes; on disk too, unless writing would keep
    the work waiting, and then when it is let go of.

    Raises:
        DatasetError: edits that cannot be had.
    """
    missing = [cell for cell in sweep.cells.values() if cell.state != "done"]
    tasks, needs = _tasks(sweep, missing)
    cell_of = {task.name: cell for task, cell in zip(tasks, missing)}
    waiting: dict[str, list[Task]] = {}  # by a shared task's name
    left = {}  # how many shared tasks a cell waits for
    for task in tasks:
        left[task.name] = len(needs[task.name])
        for shared in needs[task.name]:
            waiting.setdefault(shared.name, []).append(task)
    shared_tasks = {shared.name: shared for of in needs.values() for shared in of}
    sweep.shared = dict.fromkeys(shared_tasks, "waiting")
    workers.submit(*shared_tasks.values(), *(task for task in tasks if not left[task.name]))
    to_spend, since = _AT_ONCE, time.monotonic()
    for event in workers.events():
        name = event.task.name
        sweep.loads += event.loads
        if name in cell_of:
            _note(sweep, cell_of[name].name, event)
        else:
            sweep.shared[name] = "waiting" if event.state == "again" else event.state
            for task in waiting[name] if event.state in ("done", "failed") else ():
                left[task.name] -= 1
                if event.state == "failed":
                    reason = f"{name}, which it needs, failed:\n{event.error}"
                    _note(sweep, cell_of[task.name].name, replace(event, tries=0, seconds=0, error=reason))
                elif not left[task.name] and sweep.cells[cell_of[task.name].name].state != "failed":
                    workers.submit(task)
        now = time.monotonic()
        to_spend, since = min(_AT_ONCE, to_spend + _SHARE * (now - since)), now
        if to_spend > 0:
            _write(sweep)
            to_spend -= time.monotonic() - now
        yield event


def _note(sweep: Sweep, name: str, event: Event) -> None:
    state = "waiting" if event.state == "again" else event.state
    seconds = round(event.seconds, 2) if event.state != "running" else None
    sweep.ended += state in ("done", "failed")
    sweep.cells[name] = replace(
        sweep.cells[name], state=state, tries=event.tries, seconds=seconds, where=event.where, error=event.error
    )


def _write(sweep: Sweep) -> None:
    """Keep how the cells stand."""
    with whole(sweep.folder / STATE) as unfinished:
        unfinished.write_text(json_text(to_json(list(sweep.cells.values())), indent=1), encoding="utf-8")


def _tasks(sweep: Sweep, cells: list[Cell]) -> tuple[list[Task], dict[str, list[Task]]]:
    """A task a cell, and what each of them needs to be done before."""
    plan, tasks, needs = sweep.plan, [], {}
    shared: dict[str, Task] = {}
    for cell in cells:
        inputs, hparams = plan.inputs(cell), copy.copy(plan.hparams[cell.name])
        own = needs_statistics(hparams) and (inputs.stats_text is not None or cell.model not in world.RECIPES)
        statistics = f"statistics/{cell.place}" if own else None
        if inputs.stats_text is not None:
            hparams = with_text(hparams, inputs.stats_text)
        data = f"{in_a_name(cell.data)}-{'all' if cell.size is None else cell.size}"
        work = CellWork(
            Method(cell.method, hparams),
            _protocol(cell),
            cell.folder,
            f"before/{cell.place}/{data}_seed-{cell.seed}",
            write_inputs(sweep.folder, inputs, f"inputs/{data}-{_digest(inputs)}.json"),
            cell.seed,
            plan.eval_at,
            plan.how,
            statistics,
            versions(),
        )
        common: dict[str, Any] = {"model": loading(hparams), "resources": plan.resources[cell.model]}
        before = Task(work.before, measure_before, (work,), folder=work.before, reads=(work.inputs,), **common)
        its = [shared.setdefault(before.name, before)]
        reads = [work.inputs, work.before]
        if statistics:
            text = None
            if inputs.stats_text is not None:
                text = f"inputs/{inputs.stats_text.dataset}.json"
                _write_text(sweep.folder / text, inputs.stats_text)
            for layer in sorted(hparams.layers):
                of_layer = copy.copy(hparams)
                of_layer.layers = [layer]
                about = f"{hparams.mom2_dataset}-{hparams.mom2_n_samples}-{hparams.mom2_dtype}"
                task = Task(
                    f"{statistics}/layer-{layer}-{about}",
                    make_statistics,
                    (of_layer, text, statistics),
                    folder=statistics,
                    reads=(text,) if text else (),
                    **common,
                )
                its.append(shared.setdefault(task.name, task))
            reads.append(statistics)
        task = Task(cell.name, run_cell, (work,), folder=work.folder, reads=tuple(reads), **common)
        tasks.append(task)
        needs[task.name] = its
        sweep.edits[cell.name] = len(inputs.requests)
    return tasks, needs


def _protocol(cell: Cell) -> str:
    return cell.protocol if cell.order == 1 else in_order(cell.order)


def _digest(inputs: Inputs) -> str:
    content = json.dumps([inputs.requests, inputs.data_name, list(inputs.ability_texts)])
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _write_text(file: Path, text: Any) -> None:
    if not file.exists():
        with whole(file) as unfinished:
            unfinished.write_text(json_text({"name": text.name, "passages": list(text.passages)}), encoding="utf-8")


def _models(sweep: Sweep) -> dict[str, str]:
    """Which model each short name means, as the YAMLs name it: the runs know it by the folder where a worker has it.

    Raises:
        RunError: there are runs of another one, which would stand in the same rows.
    """
    file = sweep.folder / _MODELS
    models = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for cell in sweep.plan.cells:
        name, runs = sweep.plan.hparams[cell.name].model_name, (sweep.folder / cell.folder).parent
        if models.get(cell.model, name) != name and any(map(is_complete, runs.glob("*"))):
            raise RunError(
                f"{runs}: holds runs of another model: model_name is {models[cell.model]!r} there and {name!r} here. "
                "Name another folder for the sweep, or remove this one"
            )
        models[cell.model] = name
    return models


def _check_settings(sweep: Sweep, cell: Cell) -> None:
    """Whether a run that is there is this cell's; where the model and its statistics lie is the worker's.

    Raises:
        RunError: it is another's.
    """
    plan, folder = sweep.plan, sweep.folder / cell.folder
    inputs, hparams = plan.inputs(cell), copy.copy(plan.hparams[cell.name])
    if inputs.stats_text is not None:
        hparams = with_text(hparams, inputs.stats_text)
    there = settings_in(RunFolder(folder, {}).read("run.json"))
    here = settings_of(
        [Method(cell.method, hparams)],
        inputs.requests,
        [_protocol(cell)],
        cell.seed,
        plan.eval_at,
        plan.how,
        inputs.ability_texts,
    )
    its = there["methods"].get(cell.method, {})
    here["methods"][cell.method] |= {key: its[key] for key in ("model_name", "stats_dir") if key in its}
    if found := differences(there, json.loads(json.dumps(here))):
        raise RunError(
            f"{folder}: holds another run: {'; '.join(found)}. Name another folder for the sweep, or remove this one"
        )
