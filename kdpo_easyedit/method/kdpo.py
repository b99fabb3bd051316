"""KDPO: one edit, read top to bottom like section 3 of the paper (arXiv 2406.09920)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import kdpo_c
from .asking import asked, context_of, note_template
from .config import HParamsError, KDPOHyperParams
from .contexts import contexts, copy_contexts
from .kdpo_c import SteepestDescent, Usage
from .preference import (
    EditTokens,
    edit_tokens,
    in_one_batch,
    normalised,
    pair_margin,
    preference_loss,
    runners_up,
    sequence_margin,
    subject_span,
    teacher_forced_negatives,
    tokens_of,
)
from .replay import EditedWeights, Suffix, frozen, projecting_with
from .weights import Weights, copy_notes, holds_edit, note_edit, read, runs_on, users, write


class EditFailed(ValueError):
    """An edit that led to numbers that are not finite; the message names the edit, where it was, and its step's size.

    The model has the weights that it came with.
    """


@dataclass
class EditTrace:
    """What happened in one edit.

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


@torch.inference_mode(False)
def apply_kdpo_to_model(
    model: PreTrainedModel,
    tok: Any,
    requests: Iterable[Mapping[str, Any]],
    hparams: KDPOHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    traces: list[EditTrace] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, Weights]:
    """Edit a model: EasyEdit's interface, as ``apply_ft_to_model`` and its like.

    Several requests are edited in order, each on top of the last. An exception or Ctrl-C on the way leaves the model with
    the weights, flags and mode that it came with.

    The paper makes edits that follow one another with a fifth of the step. Where ``hparams.sequential_edit`` is left out, these
    are: several requests of one call, and a request for a model that still holds an edit. Traces tell.

    Args:
        model: a causal language model of transformers; edited in place.
        tok: its tokenizer.
        requests: each with ``prompt`` and ``target_new``, taken as :func:`.preference.normalised` has them; of EasyEdit's other
            keys only a ``subject`` is read, for a prompt with ``{}`` and for ``positions``; and ``context``, of
            :data:`.asking.CONTEXTS`: how the prompt is put to the model.
        hparams: the hyper-parameters.
        copy: edit a deep copy instead.
        return_orig_weights: return the weights as they were.
        keep_original_weight: EasyEdit's; its two versions take it differently, which the host module sees to.
        traces: a list to add a trace of every edit to.
        kwargs: what EasyEdit passes to other methods; not read.

    Returns:
        The edited model, and the edited weights as they were before the first request, by name (empty unless
        ``return_orig_weights``).

    Raises:
        HParamsError: a hyper-parameter that is wrong in itself or does not fit the model, or a model that cannot be edited.
        EditFailed: a loss or a weight that is not finite.
        ValueError: a request without a prompt or a target, or without the subject that ``positions`` needs, or one that the
            model has no room for.
    """
    if isinstance(requests, (str, Mapping)):
        raise ValueError(f"requests is a {type(requests).__name__}; allowed: a list of requests, also of one")
    complete = [_complete(request, hparams) for request in requests]
    hparams = _checked(model, hparams, len(complete))
    if copy:
        original, model = model, deepcopy(model)
        copy_notes(original, model)
        copy_contexts(original, model)
        kdpo_c.copy_knowledge(original, model)
    originals = {name: weight.clone() for name, weight in read(model, hparams.edited_parameters(model)).items()}
    usages = kdpo_c.usages(model, tok, hparams) if hparams.mom2_adjustment else {}
    try:
        for request in complete:
            weights, trace, usages = execute(model, tok, request, hparams, usages)
            write(model, weights)
            if traces is not None:
                traces.append(trace)
        if usages:
            kdpo_c.remember(model, usages)
    except BaseException:
        write(model, originals)
        raise
    return model, originals if return_orig_weights else {}


@torch.inference_mode(False)
def execute_kdpo(
    model: PreTrainedModel, tok: Any, request: Mapping[str, Any], hparams: KDPOHyperParams
) -> tuple[Weights, EditTrace]:
    """One edit (section 3 of the paper), without touching the model.

    Args:
        model: a causal language model of transformers.
        tok: its tokenizer.
        request: ``prompt`` and ``target_new``.
        hparams: the hyper-parameters.

    Returns:
        The new weights by name, in the model's dtype, and a trace of the edit.

    Raises:
        HParamsError, EditFailed, ValueError: as :func:`apply_kdpo_to_model`.
    """
    complete = _complete(request, hparams)
    hparams = _checked(model, hparams, 1)
    usages = kdpo_c.usages(model, tok, hparams) if hparams.mom2_adjustment else {}
    weights, trace, _ = execute(model, tok, complete, hparams, usages)
    return weights, trace


def execute(
    model: PreTrainedModel, tok: Any, request: dict[str, Any], hparams: KDPOHyperParams, usages: dict[str, Usage]
) -> tuple[Weights, EditTrace, dict[str, Usage]]:
    """:func:`execute_kdpo`, of a request as :func:`.preference.normalised` gives it and hyper-parameters that were checked.

    KDPO+C is told what the projections are used for, and tells it with this edit among it.
    """
    hparams = hparams.for_model(model)
    originals = read(model, hparams.edited_parameters(model))
    trace = EditTrace(sequential=bool(hparams.sequential_edit))
    try:
        weights, usages = _edited(model, tok, request, hparams, originals, usages, trace)
    except _NotFinite as what:
        key = "mom2_step" if hparams.mom2_adjustment else "lr"
        scaled = f", scaled by {hparams.step_scale:g}" if trace.sequential else ""
        raise EditFailed(
            f"the edit {request['prompt']!r} → {request['target_new']!r} failed in cycle {max(1, len(trace.losses))}, "
            f"after step {trace.steps}: {what}; the weights are as they were. {key} is {getattr(hparams, key):g}{scaled}: "
            + ("try a smaller one" if trace.steps else "no step was taken yet, so that the model itself gives such numbers")
        ) from None
    note_edit(model, originals, weights)
    return weights, trace, usages


class _NotFinite(Exception):
    """Numbers of an edit are not finite; the message says which."""


def _edited(
    model: PreTrainedModel,
    tok: Any,
    request: dict[str, Any],
    hparams: KDPOHyperParams,
    originals: Weights,
    usages: dict[str, Usage],
    trace: EditTrace,
) -> tuple[Weights, dict[str, Usage]]:
    edits, places = _sequences(model, tok, request, hparams)

    make: type[_TeacherForced | _Autoregressive] = _TeacherForced if hparams.negatives == "teacher_forced" else _Autoregressive
    entered: _Preference = make(model, edits, places, originals, hparams)
    with torch.enable_grad(), frozen(model), entered as preference:
        # θ: W alone. Everything else is frozen. The loss is scaled for float16's narrow range.
        scale = 4096 if any(original.dtype == torch.float16 for original in originals.values()) else 1
        update: _Update
        if hparams.mom2_adjustment:
            update = SteepestDescent(model, originals, usages, hparams, scale, *preference.keys())
        else:
            update = _Adam(model, originals, hparams, scale)
        for _ in range(hparams.cycles):
            negatives, now = preference.renew(update.weights)
            trace.negatives.append(negatives.tolist())
            trace.token_accuracy.append(now.accuracy)
            trace.losses.append([])
            if now.holds(hparams.margin):
                trace.ended = "the target leads by the margin" if hparams.margin else "the target is said"
                break

            reference_margin = preference.reference_margin()
            update.begin_cycle()
            for _ in range(hparams.num_steps):
                losses = preference_loss(preference.margin(update.weights), reference_margin, hparams.beta)
                loss = losses.mean()
                trace.losses[-1].append(loss.item())
                if not math.isfinite(loss.item()):
                    raise _NotFinite(f"the loss is {loss.item()}")
                if preference.led if hparams.margin else loss.item() < hparams.stop_crit:
                    break
                update.step(losses)
                preference.stepped()
                trace.steps += 1
        else:
            now = preference.now(update.weights)
        trace.final_token_accuracy, trace.lead = now.accuracy, now.lead

    weights = update.result()
    trace.factors = {name: (hparams.update_scale * left, right) for name, (left, right) in update.factors().items()}
    if hparams.update_scale != 1:
        _scale(weights, originals, hparams.update_scale)
    weights = {name: weight.to(originals[name].dtype) for name, weight in weights.items()}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise _NotFinite(f"{name} has numbers beyond those of {weight.dtype}")
    return weights, update.usages()


def _complete(request: Mapping[str, Any], hparams: KDPOHyperParams) -> dict[str, Any]:
    complete = normalised(request)
    if hparams.positions != "all":
        subject_span(complete)
    return complete


def _sequences(
    model: PreTrainedModel, tok: Any, request: dict[str, Any], hparams: KDPOHyperParams
) -> tuple[list[EditTokens], list[list[int]] | None]:
    """What an edit is made on: the prompt, and the same after each text of ``contexts`` where the model has room for it.

    Returns:
        Prompt and target as tokens, the plain prompt first, all with the same target; and the positions of each that KDPO+C's
        change is built from. None: all but the last.
    """
    prompt, target, context = request["prompt"], request["target_new"], context_of(request)
    note_template(tok, request)
    device = runs_on(model.get_input_embeddings())
    plain = edit_tokens(tok, prompt, target, device, context)
    room = getattr(model.config, "max_position_embeddings", None)
    if room and plain.input_ids.shape[1] > room:
        raise ValueError(
            f"prompt and target_new have {plain.input_ids.shape[1]} tokens, and the model takes {room}: {prompt!r}"
        )
    edits = {"": plain}
    for text in contexts(model, tok, hparams.contexts):
        edit = edit_tokens(tok, f"{text}. {prompt}", target, device, context)
        if torch.equal(edit.targets, plain.targets) and not (room and edit.input_ids.shape[1] > room):
            edits[f"{text}. "] = edit
    if len(edits) == 1 and hparams.positions == "all":
        return [plain], None

    places = []
    for before, edit in edits.items():
        in_context = asked(tok, before + prompt, context)
        text, at_prompt = in_context.answered(target), in_context.start + len(before)
        start, end = (0, len(text)) if hparams.positions == "all" else subject_span(request)
        found = tokens_of(tok, text, at_prompt + start, at_prompt + end, in_context.special_tokens)
        found = [place for place in found if place < edit.input_ids.shape[1] - 1]
        places.append(found[-1:] if hparams.positions == "subject_last" else found)
    return list(edits.values()), places


class _Update(Protocol):
    """How W is changed: :class:`_Adam`, or KDPO+C's :class:`.kdpo_c.SteepestDescent`.

    Attributes:
        weights: W, or changes of it, to run the model with.
    """

    @property
    def weights(self) -> EditedWeights: ...

    def begin_cycle(self) -> None: ...

    def step(self, losses: Tensor) -> None:
        """A step down the mean of the losses, ``[B]``."""

    def result(self) -> dict[str, Tensor]:
        """The new weights, float32, as the model stores them."""

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What is added to the weights, as :attr:`EditTrace.factors`, where that is of low rank."""

    def usages(self) -> dict[str, Usage]:
        """What the projections are used for once this edit is one of those made."""


class _Preference(Protocol):
    """What is preferred to what: :class:`_TeacherForced`, or the ablation's :class:`_Autoregressive`. A context manager.

    Attributes:
        led: with a ``margin``, whether the target had it over all of the cycle's negatives when :meth:`margin` was last asked.
    """

    led: bool

    def __enter__(self) -> _Preference: ...

    def __exit__(self, *_: object) -> None: ...

    def keys(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """What KDPO+C's change of each weight is built from, float32 ``[n, in]``, and where that is in a step's rows."""

    def renew(self, weights: EditedWeights) -> tuple[Tensor, _State]:
        """The cycle's negatives, int64 ``[T]``, and how far the edit has come."""

    def now(self, weights: EditedWeights) -> _State:
        """How far the edit has come."""

    def reference_margin(self) -> Tensor:
        """The margins of the model as it stood when the edit began, ``[B]``."""

    def margin(self, weights: EditedWeights) -> Tensor:
        """The margins now, ``[B]``."""

    def stepped(self) -> None:
        """The weights are others now."""


class _Adam:
    """The paper's optimiser.

    Attributes:
        weights: W in float32, whatever the model's dtype, where its module computes.
    """

    def __init__(self, model: PreTrainedModel, originals: Weights, hparams: KDPOHyperParams, scale: float) -> None:
        self.weights = {
            name: original.to(runs_on(model.get_submodule(name.rpartition(".")[0])), torch.float32, copy=True).requires_grad_()
            for name, original in originals.items()
        }
        self.originals, self.scale, self.limit = originals, scale, hparams.norm_constraint
        # Adam takes no notice of a loss that is scaled, its own constants too.
        self.optimizer = torch.optim.Adam(
            self.weights.values(),
            lr=hparams.lr * hparams.step_scale,
            eps=1e-8 * scale,
            weight_decay=hparams.weight_decay * scale,
            fused=True,
        )

    def begin_cycle(self) -> None:
        """Adam's state is kept."""

    def step(self, losses: Tensor) -> None:
        gradients = torch.autograd.grad(self.scale * losses.mean(), list(self.weights.values()))
        for weight, gradient in zip(self.weights.values(), gradients):
            weight.grad = gradient
        self.optimizer.step()
        if self.limit:
            _clamp(self.weights, self.originals, self.limit)

    def result(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.weights.items()}

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Its changes have all the rank that W has."""
        return {}

    def usages(self) -> dict[str, Usage]:
        """It goes by none."""
        return {}


@dataclass(frozen=True)
class _State:
    """How far an edit has come: :class:`EditTrace`'s ``token_accuracy`` and ``lead``."""

    accuracy: float
    lead: float | None = None

    def holds(self, margin: float | bool) -> bool:
        return self.accuracy == 1 and (not margin or (self.lead is not None and self.lead >= margin))


class _TeacherForced:
    """KDPO: the negative is what the model says at every position, given the target up to there.

    The same sequences serve every cycle, so what lies below W is recorded once an edit.

    Attributes:
        led: with a ``margin``, whether the target had it over all of the cycle's negatives when :meth:`margin` was last asked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        edits: Sequence[EditTokens],
        places: Sequence[Sequence[int]] | None,
        originals: Weights,
        hparams: KDPOHyperParams,
    ) -> None:
        lengths = [edit.prompt_length for edit in edits]
        self.suffix = Suffix(
            model,
            originals,
            hparams.layer_module_tmp,
            hparams.mlp_module_tmp,
            in_one_batch(edits),
            lengths if len(edits) > 1 else lengths[0],
            None if hparams.positions == "all" or places is None else [found[0] for found in places],
        )
        self.places = places
        self.targets = edits[0].targets
        self.lead, self.led = hparams.margin, False
        self.online = hparams.online
        self.one_use = hparams.mom2_adjustment  # whose keys are those of one
        self.negatives: Tensor
        self.pairs: Tensor
        self.first = True
        # Steps that leave tokens out see the lead too large by so much, as a pass over the whole has told: ``[B, T]``.
        self.short: Tensor | float = 0.0
        self.logits: Tensor | None = None

    def __enter__(self) -> _TeacherForced:
        self.suffix.__enter__()
        if self.one_use and max(self.suffix.uses.values()) > 1:
            self.suffix.__exit__()
            raise HParamsError("mom2_adjustment is True; allowed for a projection that runs several times in a pass: False")
        return self

    def __exit__(self, *_: object) -> None:
        self.suffix.__exit__()

    def keys(self) -> tuple[dict[str, Tensor], Tensor | None]:
        rows = {name: keys.flatten(0, -2).float() for name, keys in self.suffix.inputs.items()}
        if self.places is None:
            return rows, None
        width = self.suffix.own_inputs
        at = torch.tensor([row * width + place for row, places in enumerate(self.places) for place in places])
        return {name: keys[at.to(keys.device)] for name, keys in rows.items()}, self.suffix.in_steps(at)

    def renew(self, weights: EditedWeights) -> tuple[Tensor, _State]:
        """The cycle's negatives, int64 ``[T]``, those of the first sequence, and how far the edit has come.

        Where steps leave tokens out they tell, until by them the edit is done. Then a pass over the whole does.
        """
        if self.first:  # the weights are still the model's own
            negatives, state = self._state(self.suffix.own_logits)
        elif self.suffix.starts is None:
            negatives, state = self._whole(weights)
        else:
            negatives, state = self._state(self._in_step(weights).detach(), self.short)
            if state.holds(self.lead):
                negatives, state = self._whole(weights)
        if self.first or self.online:
            targets = self.targets.to(negatives.device).expand_as(negatives)
            self.negatives, self.pairs = negatives, torch.stack((targets, negatives), dim=-1)
            self.asked = negatives != targets
        self.first = False
        return self.negatives[0], state

    def now(self, weights: EditedWeights) -> _State:
        return self._whole(weights)[1]

    def _whole(self, weights: EditedWeights) -> tuple[Tensor, _State]:
        with torch.no_grad():
            logits = self.suffix.target_logits(weights)
        if self.lead and self.logits is not None:
            self.short = runners_up(self.logits.detach(), self.targets)[1] - runners_up(logits, self.targets)[1]
        return self._state(logits)

    def _state(self, logits: Tensor, short: Tensor | float = 0.0) -> tuple[Tensor, _State]:
        """By logits that have the lead too large: what to avoid, int64 ``[B, T]``, and how far the edit has come."""
        negatives, accuracy = _said(logits, self.targets)
        if not self.lead:
            return negatives, _State(accuracy)
        others, leads = runners_up(logits, self.targets)
        leads = leads - short
        negatives = torch.where(leads >= self.lead, self.targets.to(negatives.device), others)
        return negatives, _State(accuracy, leads.min().item())

    def reference_margin(self) -> Tensor:
        """Of every sequence that has a negative."""
        return pair_margin(self.suffix.own_logits.gather(-1, self.pairs))[self.asked.any(-1)]

    def margin(self, weights: EditedWeights) -> Tensor:
        if self.suffix.starts is None:
            logits = self.suffix.pair_logits(weights, self.pairs)
        else:
            logits = self._in_step(weights).gather(-1, self.pairs).float()
        if self.lead:
            chosen, rejected = logits.detach().unbind(-1)
            self.led = bool((chosen - rejected >= self.lead + self.short)[self.asked].all())
        return pair_margin(logits)[self.asked.any(-1)]

    def stepped(self) -> None:
        self.logits = None

    def _in_step(self, weights: EditedWeights) -> Tensor:
        """The logits of all tokens, ``[B, T, V]``, from one pass for all that is asked about the same weights."""
        if self.logits is None:
            self.logits = self.suffix.step_logits(weights)
        return self.logits


class _Autoregressive:
    """The paper's DPO ablation: the negative is the model's own greedy answer, and each sequence has its own prefix.

    Every answer is a sequence of its own, so what lies below W is recorded once an answer, for both in one batch.
    """

    led = False

    def __init__(
        self,
        model: PreTrainedModel,
        edits: Sequence[EditTokens],
        places: Sequence[Sequence[int]] | None,
        originals: Weights,
        hparams: KDPOHyperParams,
    ) -> None:
        self.model, (self.edit,), self.originals, self.hparams = model, edits, originals, hparams
        self.projections = {name: users(model, name) for name in originals}
        self.replay = ExitStack()
        self.negative: Tensor | None = None
        self.logits: Tensor | None = None

    def __enter__(self) -> _Autoregressive:
        return self

    def __exit__(self, *_: object) -> None:
        self.replay.close()

    def renew(self, weights: EditedWeights) -> tuple[Tensor, _State]:
        """The cycle's greedy answer, int64 ``[T]``, and how far the edit has come by teacher forcing."""
        if self.negative is None or self.hparams.online:
            self.negative = self._answer(weights)
        self.logits = self.suffix.target_logits(weights)
        return self.negative, _State(_said(self.logits[0], self.edit.targets)[1])

    def keys(self) -> tuple[dict[str, Tensor], Tensor | None]:
        raise NotImplementedError("of teacher-forced negatives only, as KDPOHyperParams sees to")

    def now(self, weights: EditedWeights) -> _State:
        return self.renew(weights)[1]

    def stepped(self) -> None:
        """Nothing is kept of the weights before."""

    def _answer(self, weights: EditedWeights) -> Tensor:
        """A new greedy answer, int64 ``[T]``, with what a step replays for it and the target."""
        self.replay.close()
        edit = self.edit
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

    def reference_margin(self) -> Tensor:
        return self._margin(self.suffix.own_logits)

    def margin(self, weights: EditedWeights) -> Tensor:
        if self.logits is None:
            return self._margin(self.suffix.target_logits(weights))
        logits, self.logits = self.logits, None
        return self._margin(logits)

    def _margin(self, logits: Tensor) -> Tensor:
        return sequence_margin(logits, self.sequences.to(logits.device))


def greedy(model: PreTrainedModel, prompt_ids: Tensor, length: int) -> Tensor:
    """The model's most likely continuation, token by token: ``[1, P]`` → int64 ``[length]``."""
    tokens: list[Tensor] = []
    output = model(input_ids=prompt_ids, use_cache=True)
    while True:
        tokens.append(output.logits[:, -1].argmax(-1).to(prompt_ids.device))
        if len(tokens) == length:
            return torch.cat(tokens)
        output = model(input_ids=tokens[-1].unsqueeze(0), past_key_values=output.past_key_values, use_cache=True)


def _clamp(weights: Weights, originals: Weights, limit: float) -> None:
    """Let no element of W stray further than ``limit`` from where the edit found it."""
    with torch.no_grad():
        for name, weight in weights.items():
            original = originals[name].to(weight.device)
            weight.sub_(original).clamp_(-limit, limit).add_(original)


def _scale(weights: Weights, originals: Weights, scale: float) -> None:
    """W_0 + Δ becomes W_0 + scale · Δ."""
    with torch.no_grad():
        for name, weight in weights.items():
            original = originals[name].to(weight.device)
            weight.sub_(original).mul_(scale).add_(original)


def _said(logits: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """What a model says by its logits, ``[…, T, V]``, and the share of it that is the target."""
    said = teacher_forced_negatives(logits)
    if not torch.isfinite(logits.gather(-1, said.unsqueeze(-1))).all():  # the largest, or one that is no number
        raise _NotFinite("the model's logits are not finite")
    return said, (said == targets.to(said.device)).sum().item() / said.numel()


def _checked(model: PreTrainedModel, hparams: KDPOHyperParams, requests: int) -> KDPOHyperParams:
    """The hyper-parameters, checked, and with whether edits follow one another, where they leave it out.

    Raises:
        HParamsError: they are wrong in themselves, or the model can have no gradients.
    """
    hparams.validate()
    if any(tensor.is_inference() for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise HParamsError(
            f"{type(model).__name__} was made under torch.inference_mode, so that it cannot have gradients; load it outside"
        )
    if hparams.sequential_edit is None:
        hparams = replace(hparams, sequential_edit=requests > 1 or holds_edit(model))
    return hparams
