"""Low-rank changes of a weight, one an edit, that are added and taken back to the bit.

An edit's change is Δ = L R, with L of ``[rows, r]`` and R of ``[r, columns]``, in float32, as the model stores the weight.
W_i = round(W_{i−1} + Δ_i) is computed in an order and precision that leave one answer on every machine: the product of two
float32 numbers is exact in float64, and the r products of an element are summed one after another.

Two things are not in the factors, and are kept beside them for the elements where they are not zero, as integer differences of
bit patterns: what the edit that was really made has rounded otherwise (``made``), and what W − Δ does not give back of the
weight as it was (``lost``), chiefly where W has moved into a coarser binade.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements of a weight that are in hand at once: what a core's own cache holds in float64.
_AT_ONCE = 1 << 17

Factors = tuple[Tensor, Tensor]


def bits(weight: Tensor) -> Tensor:
    """A weight's bit patterns as integers of the same size, on the CPU. Their sums wrap around, and so are exact."""
    return weight.detach().cpu().contiguous().view(_INTEGERS[weight.element_size()])


def added(weight: Tensor, factors: Factors, sign: int = 1) -> Tensor:
    """round(W ± L R), on the CPU, in W's dtype: the same bits everywhere."""
    weight, (left, right) = weight.detach().cpu(), (factor.cpu().double() for factor in factors)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    step = max(1, _AT_ONCE // weight.shape[1])
    for rows in (slice(start, start + step) for start in range(0, len(weight), step)):
        change = torch.zeros(weight[rows].shape, dtype=torch.float64)
        for column, row in zip(left[rows].T, right):
            change.addcmul_(column.unsqueeze(1), row)
        result[rows] = weight[rows].double().add_(change, alpha=sign)
    return result


def to_tensors(changes: Sequence[Mapping[str, Factors]]) -> dict[str, Tensor]:
    """The changes of edits, by the names of the weights, as tensors with names: ``N:W:left`` and ``N:W:right``, N from 1."""
    sides = ("left", "right")
    return {
        f"{number}:{name}:{side}": factor
        for number, its in enumerate(changes, 1)
        for name, pair in its.items()
        for side, factor in zip(sides, pair)
    }


def from_tensors(tensors: Mapping[str, Tensor], names: Iterable[str], edits: int) -> list[dict[str, Factors]]:
    """What :func:`to_tensors` was given."""
    names = list(names)
    return [
        {name: (tensors[left], tensors[f"{n}:{name}:right"]) for name in names if (left := f"{n}:{name}:left") in tensors}
        for n in range(1, edits + 1)
    ]


def spectrum(change: Tensor) -> tuple[Tensor, Tensor]:
    """The squared singular values of Δ, ``[m]``, largest first, and the singular vectors of its shorter side, ``[m, m]``.

    They are the eigenvalues and eigenvectors of Δ Δᵀ or Δᵀ Δ. The best approximation of rank r, in the Frobenius norm, is Δ
    projected on the r first vectors, and the square of what it loses is the sum of the other values.
    """
    gram = change @ change.T if change.shape[0] <= change.shape[1] else change.T @ change
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def best(change: Tensor, vectors: Tensor) -> Factors:
    """Δ projected on singular vectors of its shorter side, ``[m, r]``."""
    of_rows = len(vectors) == len(change)
    left, right = (vectors, vectors.T @ change) if of_rows else (change @ vectors, vectors.T)
    return left.float().contiguous(), right.float().contiguous()


@dataclass(frozen=True)
class Residual:
    """Bit patterns less what was computed, where they differ; in integers as small as can hold them.

    Nearly all are of some units in the last place, and a few, around 0, of millions, which are kept apart.

    Attributes:
        parts: of those that fit into eight bits, and of the others, the gaps from one such element to the next, counted through
            the rows (the first one's from −1), and the differences.
    """

    parts: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, true: Tensor, computed: Tensor) -> Residual:
        """What is to be added to a computed weight, for the true one."""
        difference = (bits(true) - bits(computed)).flatten()
        fits = difference.to(torch.int8).to(difference.dtype) == difference

        def part(places: Tensor) -> tuple[Tensor, Tensor]:
            at = places.nonzero().squeeze(1)
            return _small(at.diff(prepend=at.new_tensor([-1]))), _small(difference[at])

        return cls((part(fits & (difference != 0)), part(~fits)))

    def added_to(self, weight: Tensor, sign: int = 1) -> Tensor:
        """The weight with it, in place."""
        patterns = weight.view(_INTEGERS[weight.element_size()]).view(-1)
        for gaps, by in self.parts:
            at = gaps.cumsum(0, dtype=torch.int64) - 1
            patterns[at] = patterns[at] + sign * by.to(patterns.dtype)
        return weight


def _small(numbers: Tensor) -> Tensor:
    return numbers.to(next(kind for kind in _INTEGERS.values() if torch.equal(numbers.to(kind).to(numbers.dtype), numbers)))


@dataclass(frozen=True)
class Changes:
    """The changes of one weight by several edits.

    Attributes:
        factors: of every edit, in order; None where it left the weight alone.
        made: added after the last edit.
        lost: added once all are taken back.
    """

    factors: Sequence[Factors | None]
    made: Residual
    lost: Residual

    @classmethod
    def of(cls, before: Tensor, factors: Sequence[Factors | None], after: Tensor | None = None) -> Changes:
        """From a weight as it was, and as the edits have really left it: by default, as the factors alone do."""
        predicted = _with(before, factors)
        made = Residual.of(predicted if after is None else after, predicted)
        return cls(factors, made, Residual.of(before, _without(predicted, factors)))

    def after(self, before: Tensor, only: Collection[int] | None = None) -> Tensor:
        """The edited weight; with some of the edits alone, counted from 1, where they are given."""
        if only is None:
            return self.made.added_to(_with(before, self.factors))
        return _with(before, [pair for number, pair in enumerate(self.factors, 1) if number in only])

    def sum(self, weight: Tensor) -> Tensor:
        """Σ Δ of a weight, float64, on the CPU."""
        pairs = [pair for pair in self.factors if pair]
        if not pairs:
            return torch.zeros(weight.shape, dtype=torch.float64)
        left, right = torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs])
        return left.double() @ right.double()

    def before(self, after: Tensor) -> Tensor:
        """The weight as it was."""
        predicted = self.made.added_to(after.detach().cpu().clone(memory_format=torch.contiguous_format), -1)
        return self.lost.added_to(_without(predicted, self.factors))


def _with(weight: Tensor, factors: Sequence[Factors | None]) -> Tensor:
    weight = weight.detach().cpu().clone(memory_format=torch.contiguous_format)
    for pair in factors:
        weight = weight if pair is None else added(weight, pair)
    return weight


def _without(weight: Tensor, factors: Sequence[Factors | None]) -> Tensor:
    for pair in reversed(factors):
        weight = weight if pair is None else added(weight, pair, -1)
    return weight
