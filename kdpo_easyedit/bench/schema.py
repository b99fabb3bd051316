"""What a run's files hold: one dataclass each, for those who write them and those who read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

#: The version of these files, as ``run.json`` has it. Version 1, which has no number, is that of kdpo-easyedit 0.1.
VERSION = 2

SINGLE, SEQUENTIAL = "single", "sequential"


def in_order(number: int) -> str:
    """The protocol of the same edits in another order; number 1 is the given one, :data:`SEQUENTIAL`."""
    return SEQUENTIAL if number == 1 else f"{SEQUENTIAL}-{number}"


def is_order(protocol: str) -> bool:
    """Whether a protocol is of sequential edits in another order than the given one."""
    return protocol.startswith(f"{SEQUENTIAL}-")


def in_batches(size: int) -> str:
    """The protocol of edits made so many at once, one batch after another; of size 1, :data:`SEQUENTIAL`."""
    return SEQUENTIAL if size == 1 else f"{_BATCHES}{size}"


def batch_size(protocol: str) -> int:
    """How many edits a protocol makes at once."""
    return int(protocol.removeprefix(_BATCHES)) if protocol.startswith(_BATCHES) else 1


_BATCHES = "batches-"


#: What is measured of an edit; a :class:`Summary` has the mean of each, with an interval.
MEASURES = (
    "edit_success", "generated_success", "exact_success", "generalization", "generated_generalization", "exact_generalization",
    "portability", "locality", "fluency", "es", "ps", "ns", "judged_success", "judged_generalization",
)  # fmt: skip
#: Those whose mean a method is ranked by.
FOUR = ("edit_success", "generalization", "locality", "portability")
#: EasyEdit's metrics of one edit on one model.
Metrics = dict[str, Any]


@dataclass(frozen=True)
class EditMetrics:
    """An entry of ``metrics-METHOD-PROTOCOL.json``: one edit, in EasyEdit's format.

    Attributes:
        case_id: the edit's number, from 0.
        requested_rewrite: the request.
        pre: EasyEdit's metrics of the unedited model, and what it writes (``generated``).
        post: the same of the edited one.
        time: seconds that the edit took.
        memory: bytes that it took beyond what was taken before; None where that cannot be measured.
        once: seconds of what the method made and keeps for later edits, which ``time`` leaves out.
        error: why the edit could not be made, where it could not; ``post`` is then of the model as it was before.
    """

    case_id: int
    requested_rewrite: dict[str, Any]
    pre: Metrics
    post: Metrics = field(default_factory=dict)
    time: float | None = None
    memory: int | None = None
    error: str | None = None
    once: float | None = None


@dataclass(frozen=True)
class Summary:
    """A row of a comparison: means over the edits, each of the mean over its prompts, in percent.

    Attributes:
        edit_success, generalization: the share of the target's tokens that the model says after the prompt, or the rephrased
            prompt, under teacher forcing.
        generated_success, generated_generalization: how often what it writes there on its own begins with the target.
        fluency: n-gram entropy of what the model writes, in bits, as EasyEdit measures it.
        seconds_per_edit: wall-clock time of the edits alone.
        tokens_per_second: how fast it writes answers.
        once_seconds: of what the method made once and kept (contexts, covariances, factors), in all.
        megabytes_per_edit: the most memory that an edit takes beyond what was taken before it, the median over the edits; None
            where it cannot be measured (see :class:`kdpo_easyedit.bench.peak.PeakMemory`).
        intervals: 95 % confidence intervals of the measures (:func:`kdpo_easyedit.bench.significance.interval`).
        mean: of edit success, generalization, locality and portability.
        exact_success, exact_generalization: how often it writes the target there and nothing else.
        es, ps, ns: how often the new answer is more probable than the old one after the prompt and rephrased ones, and on
            neighbours their own answer than the new one, as ROME's line of papers measures CounterFact.
        perplexity: of ordinary text (:mod:`kdpo_easyedit.bench.ability`), of a sequence's model.
        divergence: KL from the unedited model's next-token distributions there, in nats.
        failed: how many edits could not be made; they count as the model stands without them.
        judged_success, judged_generalization: how often the judge says that what it writes there is the target.
        further: what only some runs have, in percent but for the tasks: ``unstopped`` (answers that did not stop by
            themselves), and with ``_CONTEXT`` that and the written measures in further contexts; ``em``, ``pm``, ``nm``
            (the magnitudes of ES, PS and NS) and ``score`` (their harmonic mean); ``negation`` and ``contradiction``
            (:func:`.metrics.probe`); ``task: …``, the scores of lm-evaluation-harness.
    """

    method: str
    protocol: str
    n_edits: int
    edit_success: float | None
    generalization: float | None
    locality: float | None
    portability: float | None
    fluency: float | None
    generated_success: float | None
    generated_generalization: float | None
    seconds_per_edit: float | None
    megabytes_per_edit: float | None
    intervals: dict[str, list[float]]
    failed: int = 0
    mean: float | None = None
    exact_success: float | None = None
    exact_generalization: float | None = None
    es: float | None = None
    ps: float | None = None
    ns: float | None = None
    perplexity: float | None = None
    divergence: float | None = None
    once_seconds: float | None = None
    judged_success: float | None = None
    judged_generalization: float | None = None
    tokens_per_second: float | None = None
    further: dict[str, float] = field(default_factory=dict)

    @property
    def none_made(self) -> bool:
        """Whether none of the edits could be made."""
        return self.failed == self.n_edits


@dataclass(frozen=True)
class PairedTest:
    """Whether two methods differ in a measure: a permutation test over the edits that have it with both.

    Attributes:
        against: the method that ``method`` is held against.
        difference: the mean over the edits of ``method`` less ``against``.
        p_value: two-sided.
        p_corrected: by Holm, over the methods that are held against the same one in this measure and protocol.
    """

    protocol: str
    measure: str
    method: str
    against: str
    n_edits: int
    difference: float
    p_value: float
    p_corrected: float


def in_a_name(text: str) -> str:
    """Text as a file's name can hold it."""
    return re.sub(r"[^A-Za-z0-9_.=+-]", "-", text)


@dataclass(frozen=True)
class Cell:
    """An entry of a sweep's ``sweep.json``: one method on one model and one data set, and what has become of it.

    Attributes:
        model: the short name of its hyper-parameters.
        data: a name of the sweep's own for a file of edits; ``own`` for those that come with the model.
        protocol: :data:`SINGLE`, :data:`SEQUENTIAL`, or one of :func:`in_batches`.
        size: how many edits; None for all.
        order: of sequential edits; 1 is the given one.
        overrides: hyper-parameters in the place of the YAML's.
        state: ``waiting``, ``running``, ``done`` or ``failed``.
        tries: how often it has been begun, by the last call of the sweep.
        seconds: what the last try took.
        where: on which machine and process.
        error: the last lines of why the last try ended, where it did not end well.
    """

    model: str
    method: str
    data: str
    protocol: str
    size: int | None
    seed: int
    order: int = 1
    overrides: dict[str, Any] = field(default_factory=dict)
    state: str = "waiting"
    tries: int = 0
    seconds: float | None = None
    where: str = ""
    error: str = ""

    @property
    def name(self) -> str:
        """What the cell is; also its run's folder among the sweep's ``cells``."""
        size = "all" if self.size is None else self.size
        parts = [self.method, f"{self.data}-{size}", in_order(self.order) if self.order > 1 else self.protocol]
        parts += [f"seed-{self.seed}", *(f"{key}={value}" for key, value in self.overrides.items())]
        return f"{self.place}/{in_a_name('_'.join(parts))}"

    @property
    def place(self) -> str:
        """The model's folder within each of the sweep's: its short name, and of a path what leads nowhere else."""
        return "/".join(part for part in self.model.split("/") if part not in ("", ".", ".."))

    @property
    def folder(self) -> str:
        """The run's folder, within the sweep's."""
        return f"cells/{self.name}"


Row = TypeVar("Row", EditMetrics, Summary, PairedTest, Cell)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON can hold them."""
    return [asdict(row) for row in rows]


def from_json(cls: type[Row], content: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows from what :func:`to_json` has made of them, now or in version 1.

    Raises:
        ValueError: something is missing, or not known here.
    """
    known = {f.name: f for f in fields(cls)}
    needed = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    for row in content:
        if wrong := (needed - row.keys()) | (row.keys() - known.keys()):
            raise ValueError(f"{sorted(wrong)[0]!r} is missing or not known; was it written by another version?")
    return [cls(**row) for row in content]
