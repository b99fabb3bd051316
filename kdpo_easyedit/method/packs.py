"""Edits that are run in one batch: what each is to prefer to what, and how far it has come.

A pack is one pass of the model over the sequences of its edits. :class:`TeacherForced` is KDPO's; the ablation's
:class:`Autoregressive` has one edit alone. Both answer the same questions, of which the loop over cycles and steps in
:mod:`.kdpo` is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .config import HParamsError, KDPOHyperParams
from .kdpo_c import Usage
from .preference import (
    EditTokens,
    in_one_batch,
    pair_margin,
    preference_loss,
    runners_up,
    sequence_margin,
    teacher_forced_negatives,
)
from .replay import EditedWeights, Suffix, projecting_with
from .weights import Weights, users

#: The tokens that steps run in one pass, at most, of several edits: what bounds the memory of a step.
PACK_TOKENS = 1024


class NotFinite(Exception):
    """Numbers of an edit are not finite; the message says which.

    Attributes:
        edit: which edit it is.
    """

    def __init__(self, edit: Edit, what: str) -> None:
        super().__init__(what)
        self.edit = edit


@dataclass
class EditTrace:
    """What happened in one edit, before an ``update_scale``.

    Attributes:
        negatives: of every cycle, its T tokens to avoid: what the model said at its start, or, where the negatives are not
            ``online``, at the edit's. With a ``margin``: the runners-up, of a target that leads them by it itself. With
            ``contexts``, those of the prompt without a text before it.
        losses: of every cycle, the loss before every step, and the one that ended the cycle where one did.
        token_accuracy: of every cycle, the share of the target's tokens that teacher forcing gave at its start,
            over all contexts.
        steps: optimiser steps taken.
        final_token_accuracy: the same share after the last step.
        ended: why: ``"the target is said"``, with a ``margin`` ``"the target leads by the margin"``, or
            ``"all cycles are used"``.
        sequential: whether the steps were those of edits that follow one another: scaled by ``sequential_lr_scale``.
        lead: with a ``margin``, by how many logits the target leads the runner-up after the last step, where it does least.
        factors: of KDPO+C, by the names of the weights, L and R, whose product is what the edit has added to the weight as the
            model stores it: float32, ``[rows, r]`` and ``[r, columns]``, on the CPU. Not part of :meth:`to_dict`.
    """

    negatives: list[list[int]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    token_accuracy: list[float] = field(default_factory=list)
    steps: int = 0
    final_token_accuracy: float = 0.0
    ended: str = "all cycles are used"
    sequential: bool = False
    lead: float | None = None
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The trace as plain lists and numbers, for JSON."""
        found = asdict(replace(self, factors={}))
        del found["factors"]
        return found


@dataclass
class State:
    """How far an edit has come: :class:`EditTrace`'s ``token_accuracy`` and ``lead``, and whether that is far enough."""

    accuracy: float
    lead: float | None
    holds: bool


@dataclass(eq=False)
class Edit:
    """An edit under way.

    Attributes:
        request: as :func:`.preference.normalised` gives it.
        sequences: prompt and target as tokens, the plain prompt first, all with the same target.
        places: of each sequence, the positions that KDPO+C's change is built from; None: all but the last.
        trace: what has happened.
        number: among the edits that are made together.
        open: whether steps go on for it. One that holds rests, and goes on again where others have undone it.
        due: whether its next cycle is to begin.
        taken: steps in this cycle.
        sure: whether a pass over the whole has told of it with the weights as they are.
    """

    request: dict[str, Any]
    sequences: list[EditTokens]
    places: list[list[int]] | None
    trace: EditTrace
    number: int = 0
    open: bool = True
    due: bool = True
    taken: int = 0
    sure: bool = False

    @property
    def length(self) -> int:
        """How many tokens of its longest sequence are run: from the first place on, where the change is built from few."""
        starts = [0] * len(self.sequences) if self.places is None else [found[0] for found in self.places]
        return max(s.input_ids.shape[1] - 1 - start for s, start in zip(self.sequences, starts))

    def renew(self, negatives: list[int], state: State, whole: bool, hparams: KDPOHyperParams) -> bool:
        """Take in how far it has come by a pass, over the whole or not, and what it would avoid in its next cycle.

        Returns:
            Whether that cycle begins.
        """
        trace = self.trace
        used = len(trace.losses) == hparams.cycles
        self.open = not (used or state.holds)
        if not whole:
            if state.holds:
                return False  # if the whole says so
        else:
            self.sure = True
            trace.final_token_accuracy, trace.lead = state.accuracy, state.lead
            if not state.holds:
                trace.ended = EditTrace.ended
            elif not used and (not trace.losses or trace.losses[-1]):
                trace.ended = "the target leads by the margin" if hparams.margin else "the target is said"
            else:  # it was told before
                return False
        if used:
            return False
        trace.negatives.append(negatives)
        trace.token_accuracy.append(state.accuracy)
        trace.losses.append([])
        self.due, self.taken = False, 0
        return True


class Update(Protocol):
    """How W is changed: the paper's Adam, or KDPO+C's :class:`.kdpo_c.SteepestDescent`.

    Attributes:
        weights: W, or changes of it, to run the model with.
    """

    @property
    def weights(self) -> EditedWeights: ...

    def in_step(self, at: Tensor | None, which: Tensor | None) -> EditedWeights:
        """The same in a step, whose loss is to have a gradient.

        Args:
            at: among the rows that a projection is given, flattened, those that its change is built from; None: all.
            which: of the keys, which these are; None: all, in their order.
        """

    def begin_cycle(self, edit: int) -> None: ...

    def descend(self, losses: Tensor, edits: Tensor) -> None:
        """Take in the gradient of losses, float32 ``[R]``, which are of the edits that ``edits`` numbers.

        What goes down is every edit's mean of its own, and of several edits the sum.
        """

    def step(self) -> None:
        """A step down all that was taken in since the last one."""

    def result(self) -> dict[str, Tensor]:
        """The new weights, float32, as the model stores them."""

    def factors(self, edit: int) -> dict[str, tuple[Tensor, Tensor]]:
        """What an edit adds to the weights, as :attr:`EditTrace.factors`, where that is of low rank."""

    def usages(self) -> dict[str, Usage]:
        """What the projections are used for once these edits are among those made."""


class Pack(Protocol):
    """Edits that are run in one batch: :class:`TeacherForced`, or the ablation's :class:`Autoregressive`. A context manager.

    Attributes:
        edits: the edits.
        first_key: where their keys begin among those of all.
    """

    edits: list[Edit]
    first_key: int

    def __enter__(self) -> Pack: ...

    def __exit__(self, *_: object) -> None: ...

    def begin(self, due: Sequence[Edit], update: Update) -> None:
        """Begin the next cycle of some edits with new negatives, or let those that hold rest."""

    def losses(self, going: Sequence[Edit], update: Update) -> tuple[Tensor, Tensor, list[bool]]:
        """What some edits are to bring down.

        Returns:
            The losses of their sequences, ``[R]``; which edit of them each is of, int64 ``[R]``; and with a ``margin``, whether
            an edit's target has it over all of the cycle's negatives.
        """

    def look(self, update: Update) -> None:
        """Ask the whole model of the edits that are not sure; those that do not hold go on."""

    def stepped(self) -> None:
        """The weights are others now."""

    def keys(self, usages: Mapping[str, Usage]) -> tuple[dict[str, Tensor], list[int]]:
        """What KDPO+C's change of each weight is built from, float32 ``[n, in]``, and how many of them are each edit's.

        Args:
            usages: what each weight is used for, the lowest layer's first.
        """


class TeacherForced:
    """KDPO: the negative is what the model says at every position, given the target up to there.

    The same sequences serve every cycle, so what lies below W is recorded once. Where steps leave tokens out, one pass a step
    tells all that is asked about the same weights, and a sequence that holds by it rests. Once no edit is left to go on with, a
    pass over the whole tells of all, and what it finds not to hold goes on, by the steps' own measure until it leads by so much
    more as they see too much.
    """

    def __init__(self, model: PreTrainedModel, edits: Sequence[Edit], originals: Weights, hparams: KDPOHyperParams) -> None:
        self.edits, self.hparams = list(edits), hparams
        sequences = [sequence for edit in edits for sequence in edit.sequences]
        places = [found for edit in edits for found in edit.places or ()]
        targets = max(len(sequence.targets) for sequence in sequences)
        self.suffix = Suffix(
            model,
            originals,
            hparams.layer_module_tmp,
            hparams.mlp_module_tmp,
            in_one_batch(sequences),
            [sequence.prompt_length for sequence in sequences] if len(sequences) > 1 else sequences[0].prompt_length,
            None if hparams.positions == "all" else [found[0] for found in places],
            [len(sequence.targets) for sequence in sequences],
        )
        self.sequences, self.places = sequences, places or None
        self.first_key = 0
        ends = list(itertools.accumulate(len(edit.sequences) for edit in edits))
        self.rows = {edit: range(end - len(edit.sequences), end) for edit, end in zip(edits, ends)}
        self.targets = torch.stack([F.pad(s.targets, (0, targets - len(s.targets)), value=-1) for s in sequences])
        self.real = self.targets >= 0  # others have fewer tokens
        self.targets = self.targets.clamp(min=0)
        self.pairs = torch.stack((self.targets, self.targets), dim=-1)
        self.reference = torch.zeros(len(sequences))
        self.open = [True] * len(sequences)
        # What steps see too much of the lead, as the whole has told; and what that has told where steps have not looked yet.
        self.short = torch.zeros(self.targets.shape)
        self.told: dict[int, Tensor] = {}
        self.first = True
        self.seen: tuple[list[int], Tensor] | None = None

    def __enter__(self) -> TeacherForced:
        self.suffix.__enter__()
        if self.hparams.mom2_adjustment and max(self.suffix.uses.values()) > 1:  # whose keys are those of one
            self.suffix.__exit__()
            raise HParamsError("mom2_adjustment is True; allowed for a projection that runs several times in a pass: False")
        device = self.suffix.own_logits.device
        for name in ("targets", "real", "pairs", "short"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def __exit__(self, *_: object) -> None:
        self.suffix.__exit__()

    def keys(self, usages: Mapping[str, Usage]) -> tuple[dict[str, Tensor], list[int]]:
        rows = {name: keys.flatten(0, -2).float() for name, keys in self.suffix.inputs.items()}
        if self.places is None:
            return rows, [self.suffix.length]
        if self.hparams.positions != "all":
            name, usage = next(iter(usages.items()))  # of the lowest layer
            fit = iter(usage.carries(rows[name][self._at().to(rows[name].device)].cpu()))
            for row, (sequence, found) in enumerate(zip(self.sequences, self.places)):
                # Where the subject's tokens carry nothing, those between it and the target do.
                after = list(range(found[-1] + 1, sequence.prompt_length))
                self.places[row] = [place for place in found if next(fit)] or after or found
        at = self._at()
        sizes = [sum(len(self.places[row]) for row in self.rows[edit]) for edit in self.edits]
        return {name: keys[at.to(keys.device)] for name, keys in rows.items()}, sizes

    def begin(self, due: Sequence[Edit], update: Update) -> None:
        rows = [row for edit in due for row in self.rows[edit]]
        if self.first:  # the weights are still the model's own
            self.first = False
            self._renew(due, rows, _some(self.suffix.own_logits, rows), True, update)
            self.told = {}  # steps see the same
        elif self.suffix.starts is None:
            self._renew(due, rows, _some(self._whole(update), rows), True, update)
        else:
            rows = [row for row in rows if self.open[row]]
            self._renew(due, rows, self._in_step(rows, update).detach(), False, update)

    def look(self, update: Update) -> None:
        unsure = [edit for edit in self.edits if not edit.sure]
        if unsure:
            rows = [row for edit in unsure for row in self.rows[edit]]
            self._renew(unsure, rows, _some(self._whole(update), rows), True, update)

    def losses(self, going: Sequence[Edit], update: Update) -> tuple[Tensor, Tensor, list[bool]]:
        of = [(n, row) for n, edit in enumerate(going) for row in self.rows[edit] if self.open[row]]
        rows = [row for _, row in of]
        pairs = _some(self.pairs, rows)
        if self.suffix.starts is None:
            every = range(len(self.pairs))
            logits = _some(self.suffix.pair_logits(self._weights(every, update), self.pairs), rows)
        else:
            seen = self._in_step(rows, update)
            self._compare(rows, seen)
            logits = seen.gather(-1, pairs).float()
        edits = torch.tensor([n for n, _ in of], device=logits.device)
        losses = preference_loss(pair_margin(logits), _some(self.reference, rows), self.hparams.beta)
        led = [bool(self.hparams.margin)] * len(going)
        if self.hparams.margin:
            chosen, rejected = logits.detach().unbind(-1)
            asked = pairs[..., 0] != pairs[..., 1]
            leads = (chosen - rejected >= self.hparams.margin + _some(self.short, rows)) | ~asked
            for (n, _), has_it in zip(of, leads.all(-1).tolist()):
                led[n] &= has_it
        return losses, edits, led

    def stepped(self) -> None:
        self.seen = None

    # ----------------------------------------------------------------------------------------------------------------

    def _at(self) -> Tensor:
        """The places among the rows of :attr:`Suffix.inputs`, flattened; int64 ``[n]``."""
        assert self.places is not None
        return torch.tensor([row * self.suffix.length + place for row, found in enumerate(self.places) for place in found])

    def _renew(self, edits: Sequence[Edit], rows: list[int], logits: Tensor, whole: bool, update: Update) -> None:
        """Let edits know how far they have come, by the logits of some or all of their sequences, ``[R, T, V]``."""
        targets, real, margin = _some(self.targets, rows), _some(self.real, rows), self.hparams.margin
        negatives = teacher_forced_negatives(logits)
        finite = torch.isfinite(logits.gather(-1, negatives.unsqueeze(-1))).flatten(1).all(-1)  # the largest, or no number
        wrong = ((negatives != targets) & real).sum(-1)
        least = None
        if margin:
            others, leads = runners_up(logits, targets)
            if whole:
                self.told = dict(zip(rows, leads)) if self.suffix.starts is not None else {}
            else:
                leads = leads - _some(self.short, rows)
            negatives = torch.where(leads >= margin, targets, others)
            least = leads.masked_fill(~real, math.inf).amin(-1).tolist()
        negatives = torch.where(real, negatives, targets)
        if not self.hparams.online:  # those of its start, of a sequence that had any then
            pairs = _some(self.pairs, rows)
            negatives = torch.where((pairs[..., 0] != pairs[..., 1]).any(-1, keepdim=True), pairs[..., 1], negatives)
        asked = (negatives != targets).any(-1).tolist()
        found, wrong_of, finite_of = negatives.tolist(), wrong.tolist(), finite.tolist()
        place, renewed = {row: n for n, row in enumerate(rows)}, []
        for edit in edits:
            its = [(row, place[row]) for row in self.rows[edit] if row in place]
            if not all(finite_of[n] for _, n in its):
                raise NotFinite(edit, "the model's logits are not finite")
            length = len(edit.sequences[0].targets)
            total = length * len(edit.sequences)
            accuracy = (total - sum(wrong_of[n] for _, n in its)) / total
            lead = min(least[n] for _, n in its) if least else None
            state = State(accuracy, lead, accuracy == 1 if lead is None else lead >= margin)
            first = self.rows[edit][0]
            avoid = found[place[first]] if first in place else self.targets[first].tolist()
            if edit.renew(avoid[:length], state, whole, self.hparams):
                update.begin_cycle(edit.number)
                renewed += its
        if renewed:
            of_pack, of_these = ([row for row, _ in renewed], [n for _, n in renewed])
            self.pairs[of_pack, :, 1] = negatives[of_these]
            self.reference = pair_margin(self.suffix.own_logits.gather(-1, self.pairs))
            for row, n in renewed:
                self.open[row] = asked[n]

    def _whole(self, update: Update) -> Tensor:
        with torch.no_grad():
            return self.suffix.target_logits(update.weights)

    def _in_step(self, rows: list[int], update: Update) -> Tensor:
        """The logits of all tokens for some sequences, ``[R, T, V]``, by the pass over all that go on with these weights."""
        if self.seen is None or not set(rows) <= set(self.seen[0]):
            going = [row for edit in self.edits if edit.open for row in self.rows[edit] if self.open[row]]
            self.suffix.select(going)
            self.seen = going, self.suffix.step_logits(self._weights(going, update))
        place = {row: n for n, row in enumerate(self.seen[0])}
        return _some(self.seen[1], [place[row] for row in rows])

    def _weights(self, rows: Sequence[int], update: Update) -> EditedWeights:
        """The weights for a step that runs some of the sequences."""
        if self.places is None:
            return update.in_step(None, None)
        ends = list(itertools.accumulate(map(len, self.places), initial=self.first_key))
        which = [n for row in rows for n in range(ends[row], ends[row + 1])]
        return update.in_step(self.suffix.at(rows, [self.places[row] for row in rows]), torch.tensor(which))

    def _compare(self, rows: list[int], seen: Tensor) -> None:
        """What steps see of sequences that the whole has told of, with the same weights."""
        told = [n for n, row in enumerate(rows) if row in self.told]
        if told:
            of_pack = [rows[n] for n in told]
            leads = runners_up(_some(seen.detach(), told), self.targets[of_pack])[1]
            self.short[of_pack] = leads - torch.stack([self.told[row] for row in of_pack])
        self.told = {}


class Autoregressive:
    """The paper's DPO ablation: the negative is the model's own greedy answer, and each sequence has its own prefix.

    Every answer is a sequence of its own, so what lies below W is recorded once an answer, for both in one batch.
    """

    def __init__(self, model: PreTrainedModel, edits: Sequence[Edit], originals: Weights, hparams: KDPOHyperParams) -> None:
        (self.edit,) = self.edits = list(edits)
        (self.sequence,) = self.edit.sequences
        self.model, self.originals, self.hparams = model, originals, hparams
        self.first_key = 0
        self.projections = {name: users(model, name) for name in originals}
        self.replay = ExitStack()
        self.negative: Tensor | None = None
        self.logits: Tensor | None = None

    def __enter__(self) -> Autoregressive:
        return self

    def __exit__(self, *_: object) -> None:
        self.replay.close()

    def begin(self, due: Sequence[Edit], update: Update) -> None:
        if self.negative is None or self.hparams.online:
            self.negative = self._answer(update.weights)
        self.logits = self.suffix.target_logits(update.weights)
        if self._renew(self.negative, self.logits):
            update.begin_cycle(self.edit.number)

    def look(self, update: Update) -> None:
        if not self.edit.sure and self.negative is not None:
            self._renew(self.negative, self.suffix.target_logits(update.weights))

    def losses(self, going: Sequence[Edit], update: Update) -> tuple[Tensor, Tensor, list[bool]]:
        logits = self.suffix.target_logits(update.weights) if self.logits is None else self.logits
        self.logits = None
        now, before = (sequence_margin(z, self.sequences.to(z.device)) for z in (logits, self.suffix.own_logits))
        loss = preference_loss(now, before, self.hparams.beta)
        return loss.unsqueeze(0), torch.zeros(1, dtype=torch.int64, device=loss.device), [False]

    def stepped(self) -> None:
        self.logits = None

    def keys(self, usages: Mapping[str, Usage]) -> tuple[dict[str, Tensor], list[int]]:
        raise NotImplementedError("KDPO+C has teacher-forced negatives, as KDPOHyperParams sees to")

    def _renew(self, negative: Tensor, logits: Tensor) -> bool:
        said = teacher_forced_negatives(logits[0])
        if not torch.isfinite(logits[0].gather(-1, said.unsqueeze(-1))).all():
            raise NotFinite(self.edit, "the model's logits are not finite")
        accuracy = (said == self.sequence.targets.to(said.device)).sum().item() / len(said)
        return self.edit.renew(negative.tolist(), State(accuracy, None, accuracy == 1), True, self.hparams)

    def _answer(self, weights: EditedWeights) -> Tensor:
        """A new greedy answer, int64 ``[T]``, with what a step replays for it and the target."""
        self.replay.close()
        edit = self.sequence
        prompt = edit.input_ids[:, : edit.prompt_length]
        with torch.no_grad(), projecting_with(self.projections, weights):
            negative = greedy(self.model, prompt, len(edit.targets))
        both = torch.cat((edit.input_ids, torch.cat((prompt, negative.unsqueeze(0)), dim=1)))
        self.sequences = both[:, edit.prompt_length :]
        self.suffix = self.replay.enter_context(
            Suffix(
                self.model,
                self.originals,
                self.hparams.layer_module_tmp,
                self.hparams.mlp_module_tmp,
                both,
                edit.prompt_length,
            )
        )
        return negative


def greedy(model: PreTrainedModel, prompt_ids: Tensor, length: int) -> Tensor:
    """The model's most likely continuation, token by token: ``[1, P]`` → int64 ``[length]``."""
    tokens: list[Tensor] = []
    output = model(input_ids=prompt_ids, use_cache=True)
    while True:
        tokens.append(output.logits[:, -1].argmax(-1).to(prompt_ids.device))
        if len(tokens) == length:
            return torch.cat(tokens)
        output = model(input_ids=tokens[-1].unsqueeze(0), past_key_values=output.past_key_values, use_cache=True)


def packed(edits: Sequence[Edit]) -> list[list[Edit]]:
    """Edits of like length together, so that what steps run of each is no more than :data:`PACK_TOKENS`, if it is not one edit.

    They are numbered in that order.
    """
    packs: list[list[Edit]] = []
    for number, edit in enumerate(sorted(edits, key=lambda edit: edit.length)):
        edit.number = number
        together = [*packs[-1], edit] if packs else []
        if not together or sum(len(e.sequences) for e in together) * edit.length > PACK_TOKENS:
            packs.append([edit])
        else:
            packs[-1].append(edit)
    return packs


def keys_of(packs: Sequence[Pack], usages: Mapping[str, Usage]) -> tuple[dict[str, Tensor], list[int]]:
    """:meth:`TeacherForced.keys` of all packs, each of which is told where its own begin."""
    found: dict[str, list[Tensor]] = {}
    sizes: list[int] = []
    for pack in packs:
        keys, its = pack.keys(usages)
        pack.first_key = sum(sizes)
        sizes += its
        for name, rows in keys.items():
            found.setdefault(name, []).append(rows)
    return {name: torch.cat(rows) for name, rows in found.items()}, sizes


def _some(of: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor; the tensor itself where that is all of them."""
    return of if list(rows) == list(range(len(of))) else of[torch.tensor(rows, device=of.device)]
