"""Muon, the optimiser of the world's matrices, in the matrices' own dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., 2024), as ``torch.optim.Muon``, which computes in bfloat16: this does not.

    Args:
        matrices: two-dimensional parameters.
        lr: of a matrix that is not taller than wide; a taller one's is larger by the root of the ratio.
        weight_decay: decoupled.
        each: how to go over the matrices: ``map``, or that of an executor.
        momentum: of the running mean of the gradients, with Nesterov's step ahead.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        lr: float,
        weight_decay: float,
        each: Callable[..., Iterable[None]] = map,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.each = each
        self.momentum = momentum

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if not self.state[matrix]:
                    self.state[matrix]["momentum"] = torch.zeros_like(matrix)
            list(self.each(self._step, group["params"], repeat(group["lr"]), repeat(group["weight_decay"])))

    @torch.no_grad()
    def _step(self, matrix: Tensor, lr: float, weight_decay: float) -> None:
        gradient, mean = matrix.grad, self.state[matrix]["momentum"]
        assert gradient is not None
        step = orthogonalised(gradient.lerp(mean.lerp_(gradient, 1 - self.momentum), self.momentum))
        rows, columns = matrix.shape
        matrix.mul_(1 - lr * weight_decay).sub_(step, alpha=lr * max(1, rows / columns) ** 0.5)


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix with its singular values brought near 1 (to within 0.7 and 1.2, but the smallest), in its own dtype.

    Newton and Schulz's iteration X ← (a + b XXᵀ + c (XXᵀ)²) X by the quintic of Jordan et al. All factors are polynomials of
    the first XXᵀ and commute, so that the iterations take square matrices of the shorter side alone.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    gram = wide @ wide.T
    product = torch.eye(len(gram), dtype=gram.dtype)
    for _ in range(iterations):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    wide = product @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
