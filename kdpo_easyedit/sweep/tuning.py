"""Settings for methods, chosen on development edits, with the same budget of trials for each.

A trial is a run of :func:`kdpo_easyedit.bench.protocols.compare` with one method. The first of every method has its present
settings; the others are chosen by Optuna's tree-structured Parzen estimator in the method's search space
(:mod:`.space`). How good a trial is, :func:`score` says.

What a trial chooses follows from the seed, its number, and the trials before its batch, however often the study was stopped
and wherever it runs. A trial that was under way when the process died goes on in its own folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from transformers import AutoConfig

from ..bench.datasets import Request
from ..bench.measuring import Measuring
from ..bench.protocols import Method, compare
from ..bench.protocols import measure_before as measure
from ..bench.runs import Journal, RunError, RunFolder
from ..bench.schema import FOUR, SINGLE, Summary, from_json, to_json
from ..bench.versions import versions
from ..devices import device_name
from ..easyedit.host import HostError
from ..easyedit.hparams import load_hparams, run_as
from ..easyedit.loading import in_place, loading
from ..easyedit.methods import check_method
from ..files import whole
from ..method.config import HParamsError, find_hparams, loading_dtype, read_yaml, yaml_folder
from ..method.statistics import Text
from .space import Space
from .tasks import Place, Resources, Task, Workers

LOG = logging.getLogger(__name__)

#: Teacher-forced figures alone: a trial writes nothing.
HOW = Measuring(contexts=(), fluency=False)
#: How far perplexity may rise, in percent, before it counts.
TOLERATED = 2.0
# The estimator begins after so many trials that have a score, the present settings' among them.
_RANDOM = 5
_JOURNAL = "study.jsonl"


class TuneError(RuntimeError):
    """Tuning cannot go on; the message says why."""


@dataclass(frozen=True)
class Tuning:
    """What methods are tuned on, the same for all.

    Attributes:
        hparams: the model's short name, of the YAMLs in the folders of the methods; or, for one method, a YAML's path.
        requests: development edits: none that is reported.
        data_name: what comments and tables call them.
        protocols: ``single``, ``sequential``.
        trials: how many a method has, failed ones included.
        seed: of what trials choose, and of all sampling within them.
        at_once: how many trials of a method are chosen together, and may run side by side.
        stats_text: for the methods that go by second moments.
        ability_texts: for perplexity after the sequence; where there are none, it does not count.
        device, dtype: in the place of the YAMLs'.
    """

    hparams: str
    requests: Sequence[Request]
    data_name: str
    protocols: Sequence[str]
    trials: int
    seed: int = 0
    at_once: int = 1
    stats_text: Text | None = None
    ability_texts: Sequence[str] = ()
    device: str | None = None
    dtype: str | None = None

    @property
    def name(self) -> str:
        """What folders and the YAMLs to be written are called."""
        return Path(self.hparams).name.removesuffix(".yaml")


@dataclass(frozen=True)
class Tuned:
    """What a method's trials have found.

    Attributes:
        trials, failed: how many there were, and how many of them failed.
        present: the score of the present settings; None where their trial failed.
        best: the highest score; None where all failed.
        rows: the best one's figures, a row a protocol.
        changed: what it has in the place of the present settings.
        file: the YAML; None where all failed.
        error: why the last trial that failed did.
    """

    method: str
    trials: int
    failed: int
    present: float | None
    best: float | None
    rows: Sequence[Summary]
    changed: Mapping[str, Any]
    file: Path | None
    error: str


def score(rows: Sequence[Summary], perplexity: float | None) -> float:
    """How good a trial is: the mean over its protocols of the mean of edit success, generalization, locality and portability,
    teacher-forced, in percent; of a sequence's less a point for every percent by which perplexity has risen beyond 2 %.

    Args:
        rows: a row a protocol.
        perplexity: the unedited model's; None where it was not measured.

    Raises:
        ArithmeticError: a figure that is not finite.
    """
    values = []
    for row in rows:
        value = row.mean
        if value is not None and row.perplexity is not None and perplexity:
            value -= max(0.0, 100 * (row.perplexity / perplexity - 1) - TOLERATED)
        if value is None or not math.isfinite(value):
            raise ArithmeticError(f"{row.protocol} edits: the mean is {row.mean} and perplexity {row.perplexity}: not finite")
        values.append(value)
    return sum(values) / len(values)


# --------------------------------------------------------------------------------------------------------------------
# What is done at a place, possibly on another machine.


@dataclass(frozen=True)
class _Work:
    """A trial as :func:`run_trial` needs it; folders are within the root."""

    method: Method
    tuning: Tuning
    folder: str
    before: str


def measure_before(place: Place, work: _Work) -> None:
    """Measure the model before any edit, for all trials of all methods."""
    folder, tuning = place.root / work.before, work.tuning
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):  # another process may tune other methods here
        model = place.model(work.method.hparams)
        measure(work.method, tuning.requests, folder, tuning.seed, quiet=True, how=HOW, loaded=model)


def run_trial(place: Place, work: _Work) -> dict[str, Any]:
    """Run a trial: ``rows`` and the unedited model's ``perplexity``, or ``error``: why these settings cannot be measured."""
    tuning, folder = work.tuning, place.root / work.folder
    model = place.model(work.method.hparams)
    try:
        comparison = compare(
            [work.method],
            tuning.requests,
            tuning.protocols,
            folder,
            seed=tuning.seed,
            eval_at=[len(tuning.requests)],
            quiet=True,
            stats_text=tuning.stats_text,
            data_name=tuning.data_name,
            how=HOW,
            ability_texts=tuning.ability_texts,
            loaded=model,
            before=place.root / work.before,
        )
        failed = [row for row in comparison.rows if row.none_made]
        if failed:
            raise ArithmeticError(f"none of the {failed[0].protocol} edits could be made")
        score(comparison.rows, comparison.before.perplexity)
    except (HostError, RunError, OSError):
        raise
    except Exception as error:  # whatever settings that go too far come as
        place.forget()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    for file in folder.glob("weights-*"):  # also one that a killed process was writing
        file.unlink()  # to go on from, and of a model's size
    return {"rows": to_json(comparison.rows), "perplexity": comparison.before.perplexity}


# --------------------------------------------------------------------------------------------------------------------
# A method's study.


class _Study:
    """A method's trials, in Optuna's journal in the method's folder."""

    def __init__(self, method: str, tuning: Tuning, folder: Path, file: Path, overwrite: bool) -> None:
        self.method, self.tuning, self.folder, self.file, self.overwrite = method, tuning, folder, file, overwrite
        self.source, self.kept = find_hparams(method, tuning.hparams), folder / "present.yaml"
        if self.kept.exists() and self.source.resolve() == file.resolve():  # which may be written over by now
            self.source = self.kept
        self.present = read_yaml(self.source)
        self.hparams = self._load({})
        check_method(self.hparams, sequential=any(protocol != SINGLE for protocol in tuning.protocols))
        self._results: dict[int, dict[str, Any]] = {}
        self._batch: list[int] = []

    def _load(self, settings: Mapping[str, Any]) -> Any:
        hparams = load_hparams(self.method, self.source, settings)
        run_as(hparams, self.tuning.device, self.tuning.dtype)
        return hparams

    @cached_property
    def space(self) -> Space:
        """What is chosen from."""
        config = AutoConfig.from_pretrained(in_place(self.hparams).model_name)
        return Space(self.method, self.hparams, config.get_text_config().num_hidden_layers)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """For a block, the study's folder is this process's alone.

        Raises:
            RunError: another process is at work there, or it holds another study.
            TuneError: the YAML to be written is there, and is not this study's.
        """
        from optuna import create_study
        from optuna.logging import WARNING, set_verbosity
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        tuning = self.tuning
        settings = {
            "present": self.present,
            "device": self.hparams.device,
            "dtype": str(loading_dtype(self.hparams)),
            "space": self.space.words(),
            "data": _digest(tuning.requests),
            "protocols": list(tuning.protocols),
            "seed": tuning.seed,
            "at_once": tuning.at_once,
            "statistics": tuning.stats_text and _digest([tuning.stats_text.name, *tuning.stats_text.passages]),
            "ability": _digest(list(tuning.ability_texts)),
            "versions": {**versions(), "optuna": version("optuna")},
        }
        with RunFolder(self.folder, settings, anew="remove this one"):
            if not self.kept.exists():
                with whole(self.kept) as unfinished:
                    shutil.copyfile(self.source, unfinished)
            Journal(self.folder / _JOURNAL).mend()  # Optuna would write on in a line that was cut off
            set_verbosity(WARNING)
            storage = JournalStorage(JournalFileBackend(str(self.folder / _JOURNAL)))
            self.study = create_study(storage=storage, study_name=self.method, direction="maximize", load_if_exists=True)
            if not self.study.get_trials(deepcopy=False):
                self.study.enqueue_trial(self.space.present)
            if self.file.exists() and not self.overwrite:
                there = self.file.read_text(encoding="utf-8")
                # What was written last may be of fewer trials, where others were added and then stopped.
                if there != self.text() and _digest(there) != self.study.user_attrs.get("written"):
                    raise TuneError(
                        f"{self.file} is there already; name another folder with --save_hparams, or add --overwrite"
                    )
            yield

    def next_batch(self) -> list[_Work]:
        """The trials that are to be run now: those that were under way, or chosen now; none where all are done.

        Those whose settings cannot be are failed at once.
        """
        from optuna.trial import Trial, TrialState

        while True:
            trials = self.study.get_trials(deepcopy=False)
            chosen = [Trial(self.study, trial._trial_id) for trial in trials if trial.state == TrialState.RUNNING]
            number = len([trial for trial in trials if trial.state != TrialState.WAITING])
            while number < self.tuning.trials and (not chosen or number % self.tuning.at_once):
                chosen.append(self.study.ask())
                number += 1
            works = [work for trial in chosen if (work := self._work(trial)) is not None]
            if works or not chosen:
                self._batch = [int(Path(work.folder).name) for work in works]
                return works

    def _work(self, trial: Any) -> _Work | None:
        from optuna.samplers import TPESampler

        seed = int(_digest([self.tuning.seed, self.method, trial.number]), 16) % 2**32
        self.study.sampler = TPESampler(seed=seed, n_startup_trials=_RANDOM)  # what is chosen is drawn now
        settings = self.space.settings(trial)  # of a trial that was under way, what it had chosen
        if trial.number == 0:
            settings = {}
        trial.set_user_attr("settings", settings)
        try:
            hparams = self._load(settings)
        except HParamsError as error:
            self._fail(trial.number, trial, str(error))
            return None
        root = self.folder.parent.parent
        of_before = [self.tuning.requests, self.tuning.seed, loading(hparams), versions()]
        before = f"{self.tuning.name}/before-{_digest(of_before)[:8]}"
        folder = self.folder.relative_to(root) / "trials" / f"{trial.number:03d}"
        return _Work(Method(self.method, hparams), self.tuning, folder.as_posix(), before)

    def _fail(self, number: int, trial: Any, error: str) -> None:
        from optuna.trial import TrialState

        LOG.warning("%s, trial %d failed: %s", self.method, number, error)
        trial.set_user_attr("error", error)
        self.study.tell(number, state=TrialState.FAIL)

    def note(self, work: _Work, result: dict[str, Any]) -> bool:
        """Take a trial's result; whether its batch is done. Results are told in the order of the trials."""
        from optuna.trial import Trial

        self._results[int(Path(work.folder).name)] = result
        if not all(number in self._results for number in self._batch):
            return False
        ids = {trial.number: trial._trial_id for trial in self.study.get_trials(deepcopy=False)}
        for number in self._batch:
            its, trial = self._results.pop(number), Trial(self.study, ids[number])
            if "error" in its:
                self._fail(number, trial, its["error"])
                continue
            trial.set_user_attr("rows", its["rows"])
            trial.set_user_attr("perplexity", its["perplexity"])
            self.study.tell(number, score(from_json(Summary, its["rows"]), its["perplexity"]))
        return True

    def found(self) -> Tuned:
        """What there is so far."""
        from optuna.trial import TrialState

        trials = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        errors = [trial.user_attrs["error"] for trial in trials if trial.state == TrialState.FAIL]
        best = max(done, key=lambda trial: trial.values[0], default=None)  # of equals, the first
        return Tuned(
            self.method,
            len(trials),
            len(errors),
            next((trial.value for trial in done if trial.number == 0), None),
            best.value if best else None,
            from_json(Summary, best.user_attrs["rows"]) if best else [],
            best.user_attrs["settings"] if best else {},
            self.file if best else None,
            errors[-1] if errors else "",
        )

    def text(self) -> str:
        """The YAML of the best settings so far; empty where there are none."""
        found, tuning = self.found(), self.tuning
        if found.best is None:
            return ""
        figures = "; ".join(
            f"{row.protocol}: "
            + ", ".join(f"{key.replace('_', ' ')} {value:.1f}" for key in FOUR if (value := getattr(row, key)) is not None)
            + (f", perplexity {row.perplexity:.2f}" if row.perplexity is not None else "")
            for row in found.rows
        )
        failed = f", of which {found.failed} failed" if found.failed else ""
        present = "could not be measured" if found.present is None else f"score {found.present:.2f}"
        comment = [
            f"Chosen by kdpo tune for {self.method} on {tuning.name}, on {len(tuning.requests)} development edits "
            f"({tuning.data_name}), which are in no reported table.",
            f"Tried: {found.trials} trials{failed}: the settings it began with, then by Optuna "
            f"{version('optuna')}'s TPE, seed {tuning.seed}. Space: "
            + "; ".join(f"{name} {words}" for name, words in self.space.words().items())
            + ".",
            f"Score: {found.best:.2f}; the settings it began with {present}. {_OBJECTIVE}",
            f"Of the best, {figures}.",
        ]
        lines = [f"# {line}" for part in comment for line in textwrap.wrap(part, 120, break_on_hyphens=False)]
        settings = yaml.safe_dump(
            {**self.present, **found.changed}, sort_keys=False, default_flow_style=None, width=1000, allow_unicode=True
        )
        return "\n".join(lines) + "\n" + settings

    def write(self) -> Tuned:
        """Write the YAML, whole or not at all; returns what was found."""
        found = self.found()
        if found.file:
            found.file.parent.mkdir(parents=True, exist_ok=True)
            text = self.text()
            with whole(found.file) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
            self.study.set_user_attr("written", _digest(text))
        return found


_OBJECTIVE = (
    "The score is the mean over the protocols of the mean of edit success, generalization, locality and portability, "
    f"teacher-forced, after the sequence less a point for every percent by which perplexity rises beyond {TOLERATED:g} %."
)


def tune(
    methods: Sequence[str],
    tuning: Tuning,
    folder: Path,
    workers: Workers,
    save_hparams: Path | None = None,
    overwrite: bool = False,
    num_gpus: float | None = None,
    progress: Callable[[Tuned], None] = lambda found: None,
) -> list[Tuned]:
    """Give every method its trials, as far as they are not done, and write the YAML of each method's best.

    Args:
        methods: each with a YAML of the model's name, in a folder of its own, and a search space.
        folder: of the studies; the same call again goes on in it.
        workers: those who run trials; their root is ``folder``.
        save_hparams: where the YAMLs go, as ``METHOD/NAME.yaml``; left out, ``folder/hparams``.
        overwrite: write over YAMLs that are there.
        num_gpus: what a trial asks of a cluster; left out, 1 where it runs on CUDA.
        progress: told how a method stands, at the beginning and after every batch.

    Raises:
        TuneError: a YAML is there that is not this study's, or would be that of two methods; or a trial cannot be run at all.
        HParamsError, HostError, RunError: as :func:`kdpo_easyedit.bench.protocols.compare`.
    """
    if find_spec("optuna") is None:
        raise TuneError("tuning needs the package optuna, which is not here: pip install optuna")
    folder = folder.resolve()
    into = (save_hparams or folder / "hparams").resolve()
    name = tuning.name
    files = {method: into / yaml_folder(method) / f"{name}.yaml" for method in methods}
    of_file: dict[Path, str] = {}
    for method, file in files.items():
        if (other := of_file.setdefault(file, method)) != method:
            raise TuneError(f"editing_method names {other} and {method}, which both go into {file}; leave one of them out")
    studies = {method: _Study(method, tuning, folder / name / method, file, overwrite) for method, file in files.items()}
    with ExitStack() as stack:
        for study in studies.values():
            stack.enter_context(study.opened())
            progress(study.found())
        batches = {method: study.next_batch() for method, study in studies.items()}
        works = {work.folder: work for batch in batches.values() for work in batch}
        if works:
            first = next(iter(works.values()))
            workers.submit(_task(first.before, measure_before, first, num_gpus))
        for event in workers.events():
            if event.state == "failed":
                raise TuneError(f"{event.task.name} cannot be run:\n{event.error}")
            if event.state != "done":
                continue
            if event.task.function is measure_before:
                workers.submit(*(_task(work.folder, run_trial, work, num_gpus) for work in works.values()))
                continue
            (work,) = event.task.arguments
            study = studies[work.method.name]
            if study.note(work, event.result):
                progress(study.found())
                workers.submit(*(_task(its.folder, run_trial, its, num_gpus) for its in study.next_batch()))
        return [study.write() for study in studies.values()]


def _task(name: str, function: Callable[..., Any], work: _Work, num_gpus: float | None) -> Task:
    hparams = work.method.hparams
    if num_gpus is None:
        num_gpus = 1 if device_name(hparams.device).startswith("cuda") else 0
    folder, reads = (work.folder, (work.before,)) if function is run_trial else (work.before, ())
    return Task(name, function, (work,), loading(hparams), Resources(num_gpus), folder, reads)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
