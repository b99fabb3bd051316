"""What an edit costs with KDPO+C, without contexts, with them, and many at once, and with EasyEdit's ROME, in one run.

``kdpo benchmark --edit`` makes the same edits in every way, each from the model as it is, and prints seconds an edit and the
floor: the time in which this machine could read the weights, or do the operations, of the products that were made.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..devices import synchronize
from ..easyedit import methods as algorithms
from ..easyedit.hparams import load_hparams, run_as
from ..method.packs import EditTrace
from ..method.weights import runs_on
from .benchmark import bandwidth, rate
from .by_hand import prepared
from .companions import texts_for
from .datasets import Request
from .measuring import seed_everything
from .protocols import Method, check, editor_of
from .schema import SINGLE

#: EasyEdit's contexts for ROME, where a YAML has others: pairs of how many tokens, and how many texts of so many.
EASYEDITS_CONTEXTS = [[5, 10], [10, 10]]


@dataclass(frozen=True)
class EditCost:
    """What an edit costs; means over the edits.

    Attributes:
        name: how it is made.
        seconds: of processor time on a CPU, which other work on the machine stretches least; of time elsewhere.
        steps: of KDPO+C; None of ROME.
        floor: the seconds that its products with weights take at least, at speeds measured now.
    """

    name: str
    seconds: float
    steps: float | None
    floor: float


def ways(name: str, device: str, dtype: str) -> list[Method]:
    """How an edit is made: KDPO+C without contexts and with them, ROME by its YAML, and with EasyEdit's own contexts.

    Args:
        name: the short name of a model's hyper-parameters.

    Raises:
        HParamsError: a YAML that is not there, or holds something wrong.
    """
    aware, rome = (load_hparams(method, name) for method in ("KDPO+C", "ROME"))
    number = aware.contexts or 4
    found = {
        "KDPO+C": replace(aware, contexts=0),
        f"KDPO+C, {number} contexts": replace(aware, contexts=number),
        _rome(rome): rome,
    }
    if rome.context_template_length_params != EASYEDITS_CONTEXTS:
        own = copy.copy(rome)
        own.context_template_length_params = EASYEDITS_CONTEXTS
        found[_rome(own)] = own
    for hparams in found.values():
        run_as(hparams, device, dtype)
    return [Method(key, hparams) for key, hparams in found.items()]


def benchmark_edits(methods: Sequence[Method], requests: Sequence[Request]) -> list[EditCost]:
    """Make edits in several ways, one by one, and at once where a method can; each time from the model as it is.

    What is made once a model (contexts, the factorisation of second moments) is no part of it.

    Args:
        methods: the ways, on one model.
        requests: the edits.

    Raises:
        HostError: the model or its device cannot be had.
    """
    check(methods, [SINGLE])
    found = []
    with prepared(methods, texts_for(methods[0].hparams.model_name).statistics) as (methods, first, logs):
        weight = first.model.get_input_embeddings().weight
        now = _clock(first.model)
        speeds = bandwidth(weight, now), rate(weight, now)
        for method in tqdm(methods, desc="ways to edit", file=sys.stderr):
            editor = editor_of(method, first, SINGLE)
            algorithms.set_memory()
            groups = {method.name: [[request] for request in requests]}
            if len(requests) > 1 and algorithms.takes_batches(method.hparams):
                groups[f"{method.name}, {len(requests)} at once"] = [list(requests)]
            with algorithms.output_to(logs):
                _edit(editor, requests[:1], speeds)  # for what is made once
                for name, together in groups.items():
                    costs = [_edit(editor, group, speeds) for group in together]
                    seconds, steps, floor = (sum(values) / len(requests) for values in zip(*costs))
                    found.append(EditCost(name, seconds, steps or None, floor))
    return found


def _edit(editor: Any, requests: Sequence[Request], speeds: tuple[float, float]) -> tuple[float, int, float]:
    """Make one edit, or several at once, and take it back: its seconds, its steps, and its floor in seconds."""
    seed_everything(0)
    now, traces = _clock(editor.model), list[EditTrace]()
    synchronize()
    started = now()
    with _products(editor.model, *speeds) as floor:
        _, originals = algorithms.apply_edit(editor, editor.model, requests if len(requests) > 1 else requests[0], traces)
        synchronize()
    seconds = now() - started
    algorithms.undo_edits(editor, originals)
    return seconds, sum(trace.steps for trace in traces), sum(floor)


def _clock(model: Any) -> Callable[[], float]:
    """Of this process's processor time, for a model on a CPU; of time, elsewhere."""
    return time.process_time if runs_on(model.get_input_embeddings()).type == "cpu" else time.perf_counter


@contextmanager
def _products(model: nn.Module, bandwidth: float, rate: float) -> Iterator[list[float]]:
    """For a block, tell of every product with a weight how many seconds it takes at least: reading the weight or doing the
    operations, whichever takes longer; as much again where the gradient goes back through it."""
    found: list[float] = []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(output, Tensor):
            size = inputs[0].shape[-1] * output.shape[-1]
            rows = output.numel() // output.shape[-1]
            once = max(size * output.element_size() / bandwidth, 2 * rows * size / rate)
            found.append(2 * once if output.requires_grad else once)

    modules = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    hooks = [module.register_forward_hook(count) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _rome(hparams: Any) -> str:
    return f"ROME, {sum(number for _, number in hparams.context_template_length_params)} contexts"
