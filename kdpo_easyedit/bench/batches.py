"""How prompts are put to a model: many at once, sorted by length, or one by one.

What a prompt is measured with does not hang on what it shares a batch with: teacher-forced sequences are padded on the right,
where a causal model cannot see, and prompts to go on from on the left, with their positions counted from their own first
token. The figures are those of the prompt alone, up to the rounding of sums.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..method.replay import forward_as, linear_by_onednn

Result = TypeVar("Result")


class MetricsError(ValueError):
    """Something that cannot be measured; the message names what, and what can be done instead."""


@dataclass(frozen=True)
class Batching:
    """How many prompts go through the model at once.

    A batch that the device has no memory for is halved, until it fits.

    Attributes:
        tokens: of a teacher-forced batch, padding included. Left out, 512 on the CPU, where larger ones leave its caches and
            are slower, and 8192 elsewhere.
        rows: of a batch that is written on. Left out, 64 on the CPU and 256 elsewhere.
        one_by_one: for models that decide at every run, for all rows alike and padding included, whether an edit is asked for.
        decide_at: with ``one_by_one``, called before every prompt with the model and the place of the token to decide by:
            the prompt's last, counted from 0; -1 while text is written, the last of what the model is given.
        rows_are: called before every run with the numbers of the items that are its rows, where these go through
            different edits (:func:`kdpo_easyedit.method.replay.projecting_by_rows`).
    """

    tokens: int | None = None
    rows: int | None = None
    one_by_one: bool = False
    decide_at: Callable[[Any, int], None] | None = None
    rows_are: Callable[[Sequence[int]], None] | None = None

    def of(self, owners: Sequence[int]) -> Batching:
        """The same for items of which each belongs to one of the items that this is for."""
        told = self.rows_are
        return replace(self, rows_are=told and (lambda items: told([owners[item] for item in items])))


BY_DEVICE = Batching()


def network(model: Any) -> Any:
    """The causal language model itself, of one that is wrapped in a class of some method's or of PEFT's."""
    inner = model if hasattr(model, "get_output_embeddings") else model.model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def in_batches(
    run: Callable[[list[int]], list[Result]], lengths: Sequence[int], tokens: int | None = None, rows: int | None = None
) -> list[Result]:
    """Run items of some lengths in batches of about the same length, the longest first.

    Args:
        run: what to do with a batch, given the numbers of its items; a result for each.
        tokens: of a batch, padding included, at most; an item that is longer goes alone.
        rows: of a batch, at most.

    Returns:
        The results in the order of the items.
    """
    results: dict[int, Result] = {}
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    while order:
        fitting = len(order) if tokens is None else max(1, tokens // max(1, lengths[order[0]]))
        batch = order[: min(fitting, rows or fitting)]
        order = order[len(batch) :]
        results |= zip(batch, _halving(run, batch))
    return [results[item] for item in range(len(lengths))]


def _halving(run: Callable[[list[int]], list[Result]], batch: list[int]) -> list[Result]:
    try:
        return run(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()  # does nothing where there is no CUDA
    half = len(batch) // 2
    return _halving(run, batch[:half]) + _halving(run, batch[half:])


@contextmanager
def running(model: Any, batching: Batching) -> Iterator[None]:
    """For a block: no gradients, and on the CPU float32 layers by oneDNN, which takes half the time of torch's own choice.

    A wrapper's layers are left alone: its decisions are thresholds.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if not batching.one_by_one:
            stack.enter_context(linear_by_onednn(network(model)))
        yield


def logits_at(model: Any, inputs: Mapping[str, Tensor], wanted: Tensor) -> tuple[Tensor, Any]:
    """What a model says after some of the positions of a batch; the output layer sees no others.

    The model's own code runs, so that whatever it does to logits, scaling or soft-capping, is done.

    Args:
        inputs: the model's, of which ``input_ids`` are ``[B, L]``.
        wanted: bool ``[B, L]``, N of them true.

    Returns:
        The logits ``[N, V]``, in the order of rows and positions, and the model's output.
    """
    output_layer = network(model).get_output_embeddings()
    with ExitStack() as stack:
        if output_layer is not None:
            own = output_layer.forward

            def narrowed(hidden: Tensor) -> Tensor:
                if hidden.shape[:-1] != wanted.shape:
                    return own(hidden)
                return own(hidden[wanted.to(hidden.device)].unsqueeze(0))

            stack.enter_context(forward_as(output_layer, narrowed))
        output = model(**inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    return (logits[0] if logits.shape[:2] == (1, int(wanted.sum())) else logits[wanted.to(logits.device)]), output


def takes_positions(model: Any) -> bool:
    """Whether a model is told the positions of its tokens; those that are not find them in the attention mask."""
    return "position_ids" in inspect.signature(network(model).forward).parameters
