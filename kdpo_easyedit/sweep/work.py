"""What is done for a sweep, wherever it is done: each function is a task's, and writes into the sweep's folder."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..bench.inputs import Inputs
from ..bench.measuring import Measuring
from ..bench.protocols import Method, compare
from ..bench.protocols import measure_before as measure
from ..bench.schema import Summary, from_json
from ..bench.versions import versions
from ..easyedit.loading import in_place
from ..easyedit.statistics import files_of, prepare
from ..files import json_text, whole
from ..method.statistics import Text
from ..report.documents import document_run
from .plan import SweepError
from .tasks import Place

# How long to wait for whoever is at work in a run's folder: a process that was told to end, and has not yet.
_PATIENCE = 60


@dataclass(frozen=True)
class CellWork:
    """A cell as :func:`run_cell` needs it.

    Attributes:
        method: with its hyper-parameters.
        protocol: as :func:`kdpo_easyedit.bench.protocols.compare` takes it.
        folder, before, inputs: within the root, the run's folder, that of the measurements before, and the file of the edits.
        statistics: the folder of second moments, where they are the sweep's own.
        versions: of the code that is expected.
    """

    method: Method
    protocol: str
    folder: str
    before: str
    inputs: str
    seed: int
    eval_at: Sequence[int] | None
    how: Measuring
    statistics: str | None
    versions: Mapping[str, str]


def write_inputs(root: Path, inputs: Inputs, name: str) -> str:
    """Keep a cell's edits and text for :func:`run_cell`; returns the file, within the root."""
    file = root / name
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"requests": inputs.requests, "data_name": inputs.data_name, "ability_texts": list(inputs.ability_texts)}
        with whole(file) as unfinished:
            unfinished.write_text(json_text(content), encoding="utf-8")
    return name


def measure_before(place: Place, work: CellWork) -> None:
    """Measure a model before any edit, for all cells of the same model and edits."""
    _check_versions(work.versions)
    inputs = _read(place.root / work.inputs)
    folder = place.root / work.before
    _wait_for(folder)
    hparams = work.method.hparams
    measure(work.method, inputs["requests"], folder, work.seed, True, work.how, place.model(hparams))


def make_statistics(place: Place, hparams: Any, text: str | None, folder: str) -> None:
    """Second moments of one layer of a model, for all cells whose methods go by them; those that the user has are taken.

    Args:
        hparams: with that layer alone.
        text: the file of passages to take them over, within the root; None: what the hyper-parameters name.
        folder: where to, within the root; the same for all layers of a model.
    """
    model, tok = place.model(hparams)
    have = in_place(hparams)
    wanted, working = copy.copy(have), copy.copy(have)
    wanted.stats_dir, working.stats_dir = (
        str(place.root / folder),
        str(place.root / "unfinished" / folder / str(have.layers[0])),
    )
    ((_, target),) = files_of(model, wanted).items()
    if not target.exists():
        passages = Text(**_read(place.root / text)) if text else None
        ((_, file),) = files_of(model, have).items()
        if not file.is_file():  # made apart from other layers, which another worker may be making
            (file,) = prepare(model, tok, [working], passages, quiet=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".json", ".npz"):
            if file.with_suffix(suffix).is_file():
                with whole(target.with_suffix(suffix)) as unfinished:
                    shutil.copyfile(file.with_suffix(suffix), unfinished)
        shutil.rmtree(working.stats_dir, ignore_errors=True)


def run_cell(place: Place, work: CellWork) -> None:
    """Run a cell: what ``kdpo compare`` does with one method and one protocol, into a folder like its own."""
    _check_versions(work.versions)
    inputs = _read(place.root / work.inputs)
    hparams = copy.copy(work.method.hparams)
    if work.statistics:
        hparams.stats_dir = str(place.root / work.statistics)
    folder = place.root / work.folder
    _wait_for(folder)
    comparison = compare(
        [Method(work.method.name, hparams)],
        inputs["requests"],
        [work.protocol],
        folder,
        seed=work.seed,
        eval_at=work.eval_at,
        quiet=True,
        data_name=inputs["data_name"],
        how=work.how,
        ability_texts=inputs["ability_texts"],
        loaded=place.model(hparams),
        before=place.root / work.before,
    )
    document_run(comparison, folder)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a cell's whole run; its report is written last."""
    return (folder / "report.html").exists() and len(read_summary(folder)) == 1


def read_summary(folder: Path) -> list[Summary]:
    """The rows of a run."""
    file = folder / "summary.json"
    return from_json(Summary, _read(file)) if file.exists() else []


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _check_versions(expected: Mapping[str, str]) -> None:
    """Whether this is the code that the sweep was begun with."""
    if versions() != expected:
        raise SweepError(f"the versions here are {versions()}, and the sweep's {dict(expected)}; install the same everywhere")


def _wait_for(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", timeout=_PATIENCE):
        pass
