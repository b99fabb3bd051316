"""KDPO: one edit, read top to bottom like section 3 of the paper (arXiv 2406.09920)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import kdpo_c
from .asking import asked, context_of, note_template
from .config import HParamsError, KDPOHyperParams
from .contexts import contexts, copy_contexts
from .kdpo_c import SteepestDescent, Usage
from .packs import Autoregressive, Edit, EditTrace, NotFinite, Pack, TeacherForced, Update, keys_of, packed
from .preference import check_room, edit_tokens, has_room, means, normalised, offsets_of, subject_span, tokens_of
from .replay import EditedWeights, frozen
from .weights import Weights, at_least_float32, copy_notes, holds_edit, note_edit, read, runs_on, write


class EditFailed(ValueError):
    """An edit that led to numbers that are not finite; the message names the edit, where it was, and its step's size.

    The model has the weights that it came with.
    """


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

    Several requests are edited in order, ``batch_size`` at a time, each time on top of the last. An exception or Ctrl-C on the
    way leaves the model with the weights, flags and mode that it came with.

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
        ValueError: a request without a prompt or a target, or whose subject, where ``positions`` goes by it, is not in the
            prompt, or one that the model has no room for.
    """
    if isinstance(requests, (str, Mapping)):
        raise ValueError(f"requests is a {type(requests).__name__}; allowed: a list of requests, also of one")
    requests = list(requests)
    hparams = _checked(model, hparams, len(requests))
    complete = [_complete(request, hparams) for request in requests]
    if copy:
        original, model = model, deepcopy(model)
        copy_notes(original, model)
        copy_contexts(original, model)
        kdpo_c.copy_knowledge(original, model)
    originals = {name: weight.clone() for name, weight in read(model, hparams.edited_parameters(model)).items()}
    usages = kdpo_c.usages(model, tok, hparams) if hparams.mom2_adjustment else {}
    try:
        for first in range(0, len(complete), hparams.batch_size):
            together = complete[first : first + hparams.batch_size]
            weights, its, usages = execute(model, tok, together, hparams, usages)
            write(model, weights)
            if traces is not None:
                traces += its
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
    hparams = _checked(model, hparams, 1)
    complete = _complete(request, hparams)
    usages = kdpo_c.usages(model, tok, hparams) if hparams.mom2_adjustment else {}
    weights, (trace,), _ = execute(model, tok, [complete], hparams, usages)
    return weights, trace


def note_unedited(model: PreTrainedModel, tok: Any, hparams: KDPOHyperParams) -> None:
    """Keep what edits go by of a model as it was: texts that it writes, and its layers' statistics, which are known by the
    weights below. An edit does so by itself; where earlier edits are read into the model first, this comes before."""
    contexts(model, tok, hparams.contexts)
    if hparams.mom2_adjustment:
        kdpo_c.usages(model, tok, hparams)


def execute(
    model: PreTrainedModel,
    tok: Any,
    requests: Sequence[dict[str, Any]],
    hparams: KDPOHyperParams,
    usages: dict[str, Usage],
) -> tuple[Weights, list[EditTrace], dict[str, Usage]]:
    """:func:`execute_kdpo`, of one request or of several together.

    They are as :func:`.preference.normalised` gives them, and the hyper-parameters were checked. KDPO+C is told what the
    projections are used for, and tells it with these edits among it.
    """
    hparams = hparams.for_model(model)
    originals = read(model, hparams.edited_parameters(model))
    kind = runs_on(model.get_input_embeddings()).type
    try:
        # Whatever the caller computes in: W is optimised in float32.
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            edits = [_edit(model, tok, request, hparams, usages) for request in requests]
            weights, usages = _edited(model, edits, hparams, originals, usages)
    except NotFinite as what:
        trace, request = what.edit.trace, what.edit.request
        key = "mom2_step" if hparams.mom2_adjustment else "lr"
        scaled = f", scaled by {hparams.step_scale:g}" if trace.sequential else ""
        raise EditFailed(
            f"the edit {request['prompt']!r} → {request['target_new']!r} failed in cycle {max(1, len(trace.losses))}, "
            f"after step {trace.steps}: {what}; the weights are as they were. {key} is {getattr(hparams, key):g}{scaled}: "
            + ("try a smaller one" if trace.steps else "no step was taken yet, so that the model itself gives such numbers")
        ) from None
    note_edit(model, originals, weights)
    return weights, [edit.trace for edit in edits], usages


def _edited(
    model: PreTrainedModel, edits: Sequence[Edit], hparams: KDPOHyperParams, originals: Weights, usages: dict[str, Usage]
) -> tuple[Weights, dict[str, Usage]]:
    make: type[TeacherForced | Autoregressive] = TeacherForced if hparams.negatives == "teacher_forced" else Autoregressive
    with torch.enable_grad(), frozen(model), ExitStack() as entered:
        packs: list[Pack] = [make(model, together, originals, hparams) for together in packed(edits)]
        for pack in packs:
            entered.enter_context(pack)
        # θ: W alone. Everything else is frozen. The loss is scaled for float16's narrow range.
        scale = 4096 if any(original.dtype == torch.float16 for original in originals.values()) else 1
        update: Update
        if hparams.mom2_adjustment:
            update = SteepestDescent(model, originals, usages, hparams, scale, *keys_of(packs, usages))
        else:
            update = _Adam(model, originals, hparams, scale)
        while True:
            going = [edit for pack in packs for edit in _descent(pack, update, hparams)]
            if going:
                update.step()
                for edit in edits:
                    edit.sure = False
                for edit in going:
                    edit.trace.steps += 1
                    edit.taken += 1
                    edit.due = edit.taken == hparams.num_steps
                for pack in packs:
                    pack.stepped()
            else:
                for pack in packs:
                    pack.look(update)
                if not any(edit.open for edit in edits):
                    break

    for edit in edits:
        its = update.factors(edit.number)
        edit.trace.factors = {name: (hparams.update_scale * left, right) for name, (left, right) in its.items()}
    weights = update.result()
    if hparams.update_scale != 1:
        _scale(weights, originals, hparams.update_scale)
    weights = {name: weight.to(originals[name].dtype) for name, weight in weights.items()}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise NotFinite(edits[0], f"{name} has numbers beyond those of {weight.dtype}")
    return weights, update.usages()


def _descent(pack: Pack, update: Update, hparams: KDPOHyperParams) -> list[Edit]:
    """Begin the cycles that are due, and let ``update`` take in the gradient of the edits that go on; these edits."""
    told: set[Edit] = set()
    while True:
        for edit in pack.edits:
            edit.open &= not (edit.due and len(edit.trace.losses) == hparams.cycles)
        due = [edit for edit in pack.edits if edit.open and edit.due]
        if due:
            pack.begin(due, update)
        going = [edit for edit in pack.edits if edit.open]
        if not going:
            return []
        losses, of, led = pack.losses(going, update)
        for edit, loss, has_it in zip(going, means(losses.detach(), of, len(going)).tolist(), led):
            if edit not in told or edit in due:
                edit.trace.losses[-1].append(loss)
            if not math.isfinite(loss):
                raise NotFinite(edit, f"the loss is {loss}")
            edit.due = has_it if hparams.margin else loss < hparams.stop_crit
        told.update(going)
        if not any(edit.due for edit in going):
            break
    update.descend(losses, torch.tensor([edit.number for edit in going], device=of.device)[of])
    pack.stepped()  # what was run for the gradient is not needed any more
    return going


def _complete(request: Mapping[str, Any], hparams: KDPOHyperParams) -> dict[str, Any]:
    complete = normalised(request)
    if hparams.positions != "all" and complete.get("subject"):
        subject_span(complete)
    return complete


def _edit(
    model: PreTrainedModel, tok: Any, request: dict[str, Any], hparams: KDPOHyperParams, usages: Mapping[str, Usage]
) -> Edit:
    """What an edit is made on: the prompt, and the same after each text of ``contexts`` where the model has room for it."""
    trace = EditTrace(sequential=bool(hparams.sequential_edit))
    prompt, target, context = request["prompt"], request["target_new"], context_of(request)
    note_template(tok, request)
    device = runs_on(model.get_input_embeddings())
    plain = edit_tokens(tok, prompt, target, device, context)
    check_room(model, plain, prompt)
    edits = {"": plain}
    for text in contexts(model, tok, hparams.contexts):
        edit = edit_tokens(tok, f"{text}. {prompt}", target, device, context)
        if torch.equal(edit.targets, plain.targets) and has_room(model, edit.input_ids.shape[1]):
            edits[f"{text}. "] = edit
    if not hparams.mom2_adjustment or (len(edits) == 1 and hparams.positions == "all" and hparams.batch_size == 1):
        return Edit(request, list(edits.values()), None, trace)

    span = None
    if hparams.positions != "all":
        span = subject_span(request) if request.get("subject") else _largest_effect(model, tok, request, hparams, usages)
    places = []
    for before, edit in edits.items():
        in_context = asked(tok, before + prompt, context)
        text, at_prompt = in_context.answered(target), in_context.start + len(before)
        start, end = span or (0, len(text))
        found = tokens_of(tok, text, at_prompt + start, at_prompt + end, in_context.special_tokens)
        found = [place for place in found if place < edit.input_ids.shape[1] - 1]
        places.append(found[-1:] if hparams.positions == "subject_last" else found)
    return Edit(request, list(edits.values()), places, trace)


def _largest_effect(
    model: PreTrainedModel, tok: Any, request: dict[str, Any], hparams: KDPOHyperParams, usages: Mapping[str, Usage]
) -> tuple[int, int]:
    """From where to where in a prompt the token stands by which the edit's first step gains most, where no subject is named."""
    hparams = replace(hparams, positions="all", contexts=0, batch_size=1)
    edit = _edit(model, tok, request, hparams, usages)
    (sequence,), gains = edit.sequences, _gains(model, edit, hparams, usages)
    if not any(gains):  # it holds already, though perhaps not after every context: what would let it hold by more
        gains = _gains(model, _edit(model, tok, request, hparams, usages), replace(hparams, margin=_NEVER), usages)
    in_context = asked(tok, request["prompt"], context_of(request))
    text, start = in_context.answered(request["target_new"]), in_context.start
    end = start + len(request["prompt"])
    places = tokens_of(tok, text, start, end, in_context.special_tokens)
    best = max((place for place in places if place < sequence.prompt_length), key=gains.__getitem__)
    first, last = offsets_of(tok, text, in_context.special_tokens)[best]
    return max(first, start) - start, min(last, end) - start


# A lead, in logits, that no target has.
_NEVER = 1e9


def _gains(model: PreTrainedModel, edit: Edit, hparams: KDPOHyperParams, usages: Mapping[str, Usage]) -> list[float]:
    """What an edit's first step would gain by each of its tokens; see :meth:`.kdpo_c.SteepestDescent.gains`."""
    originals = read(model, hparams.edited_parameters(model))
    with torch.enable_grad(), frozen(model), TeacherForced(model, [edit], originals, hparams) as pack:
        update = SteepestDescent(model, originals, usages, hparams, 1, *keys_of([pack], usages))
        pack.begin([edit], update)
        if edit.open:
            update.descend(*pack.losses([edit], update)[:2])
        return [float(gain) for gain in update.gains()]


class _Adam:
    """The paper's optimiser.

    Attributes:
        weights: W in float32 or the model's wider dtype, where its module computes.
    """

    def __init__(self, model: PreTrainedModel, originals: Weights, hparams: KDPOHyperParams, scale: float) -> None:
        self.weights = {}
        for name, original in originals.items():
            device, dtype = runs_on(model.get_submodule(name.rpartition(".")[0])), at_least_float32(original.dtype)
            # Fused, Adam goes by the order in memory, which is the gradient's where nothing is transposed.
            self.weights[name] = original.to(device, dtype, copy=True).contiguous().requires_grad_()
        self.originals, self.scale, self.limit = originals, scale, hparams.norm_constraint
        self.gradients: list[Tensor] = []
        # Adam takes no notice of a loss that is scaled, its own constants too.
        self.optimizer = torch.optim.Adam(
            self.weights.values(),
            lr=hparams.lr * hparams.step_scale,
            eps=1e-8 * scale,
            weight_decay=hparams.weight_decay * scale,
            fused=True,
        )

    def in_step(self, at: Tensor | None, which: Tensor | None) -> EditedWeights:
        return self.weights

    def begin_cycle(self, edit: int) -> None:
        """Adam's state is kept."""

    def descend(self, losses: Tensor, edits: Tensor) -> None:
        loss = means(losses, edits).sum()
        gradients = torch.autograd.grad(self.scale * loss, list(self.weights.values()))
        self.gradients = [a + b for a, b in zip(self.gradients, gradients)] if self.gradients else list(gradients)
        for weight in self.weights.values():
            weight.grad = None  # in whose memory the next gradient would be put

    def step(self) -> None:
        for weight, gradient in zip(self.weights.values(), self.gradients):
            weight.grad = gradient
        self.gradients = []
        self.optimizer.step()
        if self.limit:
            _clamp(self.weights, self.originals, self.limit)

    def result(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.weights.items()}

    def factors(self, edit: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Its changes have all the rank that W has."""
        return {}

    def usages(self) -> dict[str, Usage]:
        """It goes by none."""
        return {}


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


def _checked(model: PreTrainedModel, hparams: KDPOHyperParams, requests: int) -> KDPOHyperParams:
    """The hyper-parameters, checked, and with whether edits follow one another, where they leave it out.

    Raises:
        HParamsError: they are none, or wrong in themselves, or the model can have no gradients.
    """
    if not isinstance(hparams, KDPOHyperParams):
        raise HParamsError(f"hparams is a {type(hparams).__name__}; allowed: KDPOHyperParams, as its from_hparams reads them")
    hparams.validate()
    if any(tensor.is_inference() for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise HParamsError(
            f"{type(model).__name__} was made under torch.inference_mode, so that it cannot have gradients; load it outside"
        )
    if hparams.sequential_edit is None:
        hparams = replace(hparams, sequential_edit=requests > 1 or holds_edit(model))
    return hparams
