"""KDPO+C: edits that step around what a projection is used for.

Let k be the input of W and C = E[k kᵀ] its second moment over ordinary text ("mom2"), which ROME and MEMIT use as well. A
change Δ costs everything else E‖Δk‖² = tr(Δ C Δᵀ). Plain gradient steps take no notice of that; steepest descent where that
cost, and not the size of Δ, is the measure of distance is W ← W − η G S with S = (C/c̄ + λI)⁻¹, where G is the gradient of
the loss and c̄ the mean of C's diagonal. G = Σ_t g_t k_tᵀ, with g_t the gradient at W's output at position t, so that
Δ = Aᵀ K S with the edit's keys as the rows of K, and a step is A ← A − η g. Δ is of the edit's length in rank, and S is only
needed times its keys, once. The keys of a finished edit are added to C, so that later ones step around it too.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..once import once
from .config import HParamsError, KDPOHyperParams
from .preference import means
from .replay import EditedWeights
from .statistics import StatisticsError, fingerprints, statistics_files
from .statistics import read as read_moment
from .weights import Weights, at_least_float32, checksum, read

LOG = logging.getLogger(__name__)

# The least kᵀSk, as a share of the ordinary one, of a key that an edit is built from.
_LEAST = 0.1
# How much longer than an edit's first step its later ones may be.
_LONGEST = 4


@dataclass(frozen=True)
class Usage:
    """What a projection is used for: S, for ordinary text and the keys of the edits made so far. float32, on the CPU.

    Attributes:
        inverse: (C/c̄ + λI)⁻¹, of ordinary text, ``[in, in]``.
        key_weight: what one key of an edit counts beside it.
        protected: F, ``[m, in]``: S is the inverse less FᵀF.
        ordinary: the mean of kᵀSk over ordinary text, without F.
    """

    inverse: Tensor
    key_weight: float
    protected: Tensor
    ordinary: float

    @classmethod
    def of(cls, moment: Tensor, damping: float, edit_weight: float) -> Usage:
        """From a second moment C, ``[in, in]``.

        Raises:
            ValueError: C is not positive semidefinite.
        """
        mean = moment.diagonal().double().mean()
        damped = moment.double() / mean
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if mean <= 0 or failed:
            raise ValueError("it is not positive semidefinite, as second moments are")
        inverse = torch.cholesky_inverse(factor).float()
        ordinary = (inverse * moment).sum().item()
        return cls(inverse, edit_weight / mean.item(), inverse.new_empty(0, len(inverse)), ordinary)

    def carries(self, keys: Tensor) -> list[bool]:
        """Whether an edit can be made at the places of keys, float32 ``[n, in]``.

        A text's first token, and where there is no BOS sometimes its second, has a residual stream so large that what a layer
        adds is hardly seen beside it, and its key is nearly zero. A change that is seen there is out of all measure, and is
        added to the beginning of every other text as well.
        """
        return ((keys * (keys @ self.inverse)).sum(-1) >= _LEAST * self.ordinary).tolist()

    def times(self, keys: Tensor) -> Tensor:
        """K S: float32 ``[n, in]`` → the same."""
        return keys @ self.inverse - (keys @ self.protected.T) @ self.protected

    def times_around(self, keys: Tensor, parts: Sequence[slice]) -> Tensor:
        """K S of edits that are made together, each by the S that steps around the others' keys too: float32 ``[n, in]``.

        As if each were made after all others, and at the cost of one: with w what a key counts and Q = (I + w K S Kᵀ)⁻¹,
        Kᵢ S₋ᵢ = Qᵢᵢ⁻¹ (Q K S)ᵢ (Woodbury).

        Args:
            keys: of all edits, float32 ``[n, in]``.
            parts: of them, each edit's.
        """
        basis = self.times(keys)
        if len(parts) == 1 or not self.key_weight:
            return basis
        inner = self.key_weight * (keys @ basis.T).double()
        inner.diagonal().add_(1)
        inverse = torch.cholesky_inverse(_factor(inner))
        around = inverse @ basis.double()
        return torch.cat([torch.linalg.solve(inverse[part, part], around[part]) for part in parts]).float()

    def protecting(self, keys: Tensor) -> Usage:
        """With the keys of a finished edit, float32 ``[n, in]``, added to C: an update of rank n (Woodbury), no new inverse."""
        if not self.key_weight:
            return self
        basis = self.times(keys)
        inner = (keys @ basis.T).double()
        inner.diagonal().add_(1 / self.key_weight)
        added = torch.linalg.solve_triangular(_factor(inner), basis.double(), upper=False).float()
        protected = torch.cat((self.protected, added))
        if len(protected) > 2 * len(self.inverse):  # FᵀF in as few rows as it can have
            protected = torch.linalg.qr(protected, mode="r").R
        return replace(self, protected=protected)


def _factor(inner: Tensor) -> Tensor:
    """The Cholesky factor of what edits' keys have in common, by S."""
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        raise HParamsError(
            "mom2_edit_weight is too large for these edits, whose keys float64 cannot tell apart; the default is 0.01"
        )
    return factor


class Change:
    """A change of one projection, Δ = Aᵀ K S, in edits under way. It is added to all that the projection gives.

    Args:
        usage: what the projection is used for.
        keys: K, what the projection is given where Δ is built from, at the edits' start; float32, ``[n, in]``.
        parts: of them, each edit's.
        width: of the projection's output.

    Attributes:
        basis: K S, of each edit with the S that steps around the others too; float32, ``[n, in]``.
        coefficients: A; float32, ``[n, out]``.
        nudge: zeros, ``[n, out]``, whose gradient is the loss's at the projection's output.
    """

    def __init__(self, usage: Usage, keys: Tensor, parts: Sequence[slice], width: int) -> None:
        self.usage, self.keys = usage, keys
        self.basis = usage.times_around(keys.cpu(), parts).to(keys.device)
        self.coefficients = keys.new_zeros(len(keys), width)
        self.nudge = torch.zeros_like(self.coefficients, requires_grad=True)

    def added_to(self, output: Tensor, keys: Tensor) -> Tensor:
        """The changed projection's output, from its own and its input: ``[B, L, out]`` and ``[B, L, in]``."""
        return output + self._of(keys.to(output.device)).to(output.dtype).view_as(output)

    def _of(self, keys: Tensor) -> Tensor:
        return keys.flatten(0, -2).float() @ self.basis.T @ self.coefficients


class _Nudged:
    """A change in a step, which is to have a gradient: the arguments are those of :meth:`SteepestDescent.in_step`."""

    def __init__(self, change: Change, at: Tensor | None, which: Tensor | None) -> None:
        self.change, self.at, self.which = change, at, which

    def added_to(self, output: Tensor, keys: Tensor) -> Tensor:
        change, nudge = self.change._of(keys.to(output.device)), self.change.nudge
        if self.which is not None:
            nudge = nudge[self.which.to(nudge.device)]
        change = change + nudge if self.at is None else change.index_add(0, self.at.to(change.device), nudge)
        return output + change.to(output.dtype).view_as(output)


class SteepestDescent:
    """KDPO+C's optimiser. A cycle's first step raises the preference's margin by ``mom2_step`` logits, to first order; in
    sequential edits by less, as KDPO's steps are smaller then.

    A step's size so means the same for every model, layer and damping; of several sequences it is what their margins gain in
    the mean. The cycle's later steps have the same rate η, and the loss's gradient shrinks them as the preference is learnt.
    Edits that are made together have a rate each. Where little is left of the gradient, that many logits would take a change
    without bounds: no rate makes a step, of length √tr(Δ S⁻¹ Δᵀ), more than :data:`_LONGEST` times as long as the edit's first.

    Args:
        keys: what the changes are built from, by the names of the weights, float32 ``[n, in]``, edit by edit.
        sizes: how many of them are each edit's.

    Attributes:
        changes: by the names of the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        originals: Weights,
        usages: Mapping[str, Usage],
        hparams: KDPOHyperParams,
        scale: float,
        keys: Mapping[str, Tensor],
        sizes: Sequence[int],
    ) -> None:
        self.model, self.originals, self.hparams = model, originals, hparams
        self.scale = scale
        self.parts = [slice(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes))]
        self.changes = {name: Change(usage, keys[name], self.parts, _outputs(model, name)) for name, usage in usages.items()}
        self.edits = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))  # of each key
        self.rates = [math.inf] * len(sizes)
        self.lengths = [math.inf] * len(sizes)  # of the first steps
        self.stepped = [False] * len(sizes)
        self.slopes: dict[int, float] = {}
        self.gradients: list[Tensor] = []

    @property
    def weights(self) -> EditedWeights:
        """What the model is run with: the changes; where its dtype would round off some of them, W with what is left."""
        rounds = any(at_least_float32(original.dtype) != original.dtype for original in self.originals.values())
        return self.result() if rounds and any(self.stepped) else self.changes

    def in_step(self, at: Tensor | None, which: Tensor | None) -> dict[str, _Nudged]:
        """The changes in a step; see :class:`.packs.Update`."""
        return {name: _Nudged(change, at, which) for name, change in self.changes.items()}

    def begin_cycle(self, edit: int) -> None:
        self.rates[edit] = math.inf

    def descend(self, losses: Tensor, edits: Tensor) -> None:
        """Take in the gradient of losses; see :class:`.packs.Update`."""
        count = len(self.parts)
        nudges = [change.nudge for change in self.changes.values()]
        found = torch.autograd.grad(self.scale * means(losses, edits, count).sum(), nudges)
        gradients = [gradient / self.scale for gradient in found]
        self.gradients = [a + b for a, b in zip(self.gradients, gradients)] if self.gradients else gradients
        # L = −log σ(β · margin) has the slope −β (1 − exp −L).
        slopes = means(-torch.expm1(-losses.detach()), edits, count).tolist()
        self.slopes |= {edit: slopes[edit] for edit in set(edits.tolist())}

    def step(self) -> None:
        """A step down the sum of the edits' losses."""
        changes = list(self.changes.values())
        metrics = [0.0] * len(self.parts)
        for change, gradient in zip(changes, self.gradients):
            metrics = [a + b for a, b in zip(metrics, self._metrics(change, gradient))]
        for edit, slope in self.slopes.items():
            if math.isinf(self.rates[edit]) or self.hparams.margin:
                # On the way to a margin no step gains more than the first: where the ground grows steeper it would go too far.
                self.rates[edit] = min(self.rates[edit], self._rate(edit, metrics[edit], slope))
            self.stepped[edit] = True
        taken = [
            min(self.rates[edit], self._longest(edit, metrics[edit])) if edit in self.slopes else 0.0
            for edit in range(len(self.parts))
        ]
        rates = torch.tensor(taken)[self.edits].unsqueeze(-1)
        for change, gradient in zip(changes, self.gradients):
            change.coefficients -= rates.to(gradient.device) * gradient
        self.slopes, self.gradients = {}, []

    def gains(self) -> Tensor:
        """By how much a step along each key alone lowers the losses whose gradient was taken in, to first order and a factor.

        Returns:
            |g|² kᵀ S k, summed over the projections; float32, ``[n]``, on the CPU. 0 where no gradient was taken in.
        """
        gained = torch.zeros(len(self.edits))
        for change, gradient in zip(self.changes.values(), self.gradients):
            gained += (gradient.square().sum(-1) * (change.keys * change.basis).sum(-1)).cpu()
        return gained

    def _metrics(self, change: Change, gradient: Tensor) -> list[float]:
        """tr(G S Gᵀ) of each edit's own gradient at the output, of ``[n, out]``."""
        along = [change.keys[part] @ change.basis[part].T @ gradient[part] for part in self.parts]
        sums = (gradient * torch.cat(along)).sum(-1)
        edits = self.edits.to(sums.device)
        return sums.new_zeros(len(self.parts)).index_add(0, edits, sums).tolist()

    def _rate(self, edit: int, metric: float, slope: float) -> float:
        """A step of rate η lowers an edit's loss by η tr(G S Gᵀ), and is of length η √tr(G S Gᵀ)."""
        if metric <= 0:
            return 0.0
        # What is not a number makes one that is not, which ends the edit.
        rate, norm = self.hparams.mom2_step * self.hparams.step_scale * self.hparams.beta * slope / metric, math.sqrt(metric)
        if not self.stepped[edit]:
            self.lengths[edit] = rate * norm
        return min(rate, self._longest(edit, metric))

    def _longest(self, edit: int, metric: float) -> float:
        """The rate at which a step is as long as it may be."""
        return _LONGEST * self.lengths[edit] / math.sqrt(metric) if metric > 0 else math.inf

    def result(self) -> dict[str, Tensor]:
        """The new weights, float32 or the model's wider dtype, laid out as the model stores them."""
        found = {name: original.to(at_least_float32(original.dtype), copy=True) for name, original in self.originals.items()}
        for name, change in self.changes.items():
            if any(self.stepped):
                delta = change.coefficients.T @ change.basis
                found[name] = found[name].to(delta.device) + (delta.T if _transposed(self.model, name) else delta)
        return found

    def factors(self, edit: int) -> dict[str, tuple[Tensor, Tensor]]:
        """What an edit adds to the weights as the model stores them: L and R of its Δ = L R, float32, on the CPU."""
        found = {}
        for name, change in self.changes.items():
            if self.stepped[edit]:
                left, right = change.coefficients[self.parts[edit]].T, change.basis[self.parts[edit]]
                pair = (right.T, left.T) if _transposed(self.model, name) else (left, right)
                found[name] = (pair[0].cpu().contiguous(), pair[1].cpu().contiguous())
        return found

    def usages(self) -> dict[str, Usage]:
        """What the projections are used for once these edits are among those made."""
        made = torch.tensor(self.stepped)[self.edits]
        return {
            name: change.usage.protecting(change.keys[made.to(change.keys.device)].cpu()) if made.any() else change.usage
            for name, change in self.changes.items()
        }


def _transposed(model: nn.Module, name: str) -> bool:
    """Whether a weight is stored ``[in, out]``."""
    return isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)


def _outputs(model: nn.Module, name: str) -> int:
    return model.get_parameter(name).shape[1 if _transposed(model, name) else 0]


# --------------------------------------------------------------------------------------------------------------------
# What is known of a model, as long as the model is there: the inverses, and the keys of the edits that its weights hold.


@dataclass
class _Known:
    """What is known of a model.

    Attributes:
        settings: that it is known for.
        ordinary: what its projections are used for by ordinary text.
        held: the last states of the weights that edits have led to, or led away from: their checksums, and what the projections
            are used for with the edits that the weights then hold. Two, so that the last edits can be taken back.
    """

    settings: Any
    ordinary: dict[str, Usage]
    held: list[tuple[dict[str, int], dict[str, Usage]]] = field(default_factory=list)


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def usages(model: Any, tok: Any, hparams: KDPOHyperParams) -> dict[str, Usage]:
    """What the edited projections are used for, by the names of their weights.

    Keys of earlier edits count for as long as the weights are, by their :func:`.weights.checksum`, those that these edits
    left: the last call's, or, once that is taken back, the one's before. Edits that were undone otherwise, or changed by
    something else, are not stepped around.

    Raises:
        HParamsError: statistics that are missing and cannot be made, cannot be read, or do not fit the model.
    """
    names = list(hparams.edited_parameters(model))
    settings = (
        names, hparams.stats_dir, hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype, hparams.mom2_damping,
        hparams.mom2_edit_weight,
    )  # fmt: skip
    if model not in _KNOWN or _KNOWN[model].settings != settings:
        _KNOWN[model] = _Known(settings, _ordinary(model, tok, names, hparams))
    return _edited(model) or _KNOWN[model].ordinary


def _edited(model: Any) -> dict[str, Usage]:
    """With the edits that the model holds; empty where it holds none that are known of."""
    known = _KNOWN.get(model)
    if not known or not known.held:
        return {}
    now = _checksums(model, known.ordinary)
    found = next((held for held in reversed(known.held) if held[0] == now), None)
    if found is None:
        return {}
    # What the weights hold now is the one that remember() keeps beside the next.
    known.held = [*(held for held in known.held if held is not found), found]
    return found[1]


def remember(model: Any, edited: dict[str, Usage]) -> None:
    """Let the edits that ``model`` now holds count in :func:`usages`."""
    known = _KNOWN[model]
    now = _checksums(model, known.ordinary)
    known.held = [*[held for held in known.held if held[0] != now][-1:], (now, edited)]


def copy_knowledge(model: Any, copy: Any) -> None:
    """Let what is known of a model be known of its copy."""
    if model in _KNOWN:
        _KNOWN[copy] = replace(_KNOWN[model], held=list(_KNOWN[model].held))


def protected_keys(model: Any) -> dict[str, Tensor]:
    """What is to be kept of the edits that ``model`` holds, to go on from them another time; empty where nothing is known."""
    return {name: usage.protected for name, usage in _edited(model).items()}


def protect_keys(model: Any, tok: Any, hparams: KDPOHyperParams, protected: Mapping[str, Tensor]) -> None:
    """Go on from the edits that ``model`` holds with what :func:`protected_keys` gave."""
    usages(model, tok, hparams)
    ordinary = _KNOWN[model].ordinary
    # In the model's order, lowest layer first, whatever order a file has given them in: steps go by it.
    remember(model, {n: replace(usage, protected=protected[n]) for n, usage in ordinary.items() if n in protected})


@once
def _ordinary(model: Any, tok: Any, names: Sequence[str], hparams: KDPOHyperParams) -> dict[str, Usage]:
    if not getattr(model.config, "name_or_path", ""):
        raise HParamsError(
            "mom2_adjustment is True, and the model has no name_or_path, under which its statistics are kept; "
            "set model.config.name_or_path to what they were made under"
        )
    found = {}
    try:
        files = statistics_files(model, names, hparams)
        modules = [name.removesuffix(".weight") for name in names]
        weights = fingerprints(model, modules)
        for name, module, file in zip(names, modules, files):
            moment = read_moment(file, model, module, weights[module])
            LOG.info("factorising the statistics of %s, %d × %d", name, *moment.shape)
            try:
                found[name] = Usage.of(moment, hparams.mom2_damping, hparams.mom2_edit_weight)
            except ValueError as error:
                raise HParamsError(f"{file}: {error}; remove it, and have it made anew") from None
    except StatisticsError as error:
        raise HParamsError(str(error)) from None
    return found


def _checksums(model: Any, names: Iterable[str]) -> dict[str, int]:
    return {name: checksum(weight) for name, weight in read(model, names).items()}
