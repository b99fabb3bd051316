"""Run only W and the layers above it.

During an edit only W changes, so whatever the model computes without W stays as it is: every layer below W's, and
inside W's own layer the attention and the projections that feed it. One recording pass keeps those outputs. A step is
then the model's own forward in which every such module returns what it returned before, and the output layer sees the
target's positions only. Because the model's own code runs, masks, rotary tables, norms, soft-capping and logit scaling
need no description here.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .preference import teacher_forced_negatives

LOG = logging.getLogger(__name__)


class CannotReplay(Exception):
    """The model does not run as the replay needs it to; the message says why."""


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """For a block, let ``forward`` stand in for the module's own."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:  # accelerate keeps its offloading there
            module.forward = before


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """For a block: evaluation mode, and no parameter asks for a gradient. All flags are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in flags:
            parameter.requires_grad_(True)


class Suffix:
    """A causal language model on one batch of sequences, as a function of the edited weights alone.

    Use it as a context manager, inside :func:`frozen`: within the block the model's modules are made to replay, and
    afterwards they are as they were. The model's weights are never touched.

    Args:
        model: the model.
        weights: the edited weights by name, lowest layer first, as they stand in the model.
        layer_template: a decoder layer's name with ``{}`` for its number.
        input_ids: int64, ``[B, L]``.
        prompt_length: P; positions P−1 … L−2 predict the T = L − P target tokens.

    On entering, the replay is checked: with the weights as they stand it must give the model's own logits. Where it does
    not, or where the model cannot be replayed, every call is a plain full forward with the same results, and the log says
    why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor],
        layer_template: str,
        input_ids: Tensor,
        prompt_length: int,
    ) -> None:
        self.model = model
        self.weights = weights
        self.layer_template = layer_template
        self.input_ids = input_ids
        self.positions = slice(prompt_length - 1, input_ids.shape[1] - 1)
        self.targets = input_ids[0, prompt_length:]
        self.replays = False
        self._lowest_input: Tensor | None = None
        self._restore = ExitStack()

    def __enter__(self) -> Suffix:
        try:
            with torch.no_grad():
                self._record()
                self._replay()
                self._check()
        except CannotReplay as reason:
            self._restore.close()
            self.replays, self._lowest_input = False, None
            LOG.info("every step runs the whole model: %s", reason)
        except BaseException:
            self._restore.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    # ----------------------------------------------------------------------------------------------------------------
    # What a caller asks for. `weights` are float32 leaves by name, or None for the model as it stands (the reference).

    def target_logits(self, weights: Mapping[str, Tensor] | None) -> Tensor:
        """The logits that predict the target's tokens, by the full output layer: ``[B, T, V]``."""
        if self.replays:
            return self._run(weights, self._output_forward)
        return self._run(weights)[:, self.positions]

    def pair_logits(self, weights: Mapping[str, Tensor] | None, pairs: Tensor) -> Tensor:
        """The logits of two tokens a position, from two rows of the output layer. pairs, result: ``[T, 2]``; B is 1."""
        if self.replays:
            return self._run(weights, lambda hidden: self._rows(hidden, pairs))[0]
        return self.target_logits(weights)[0].gather(-1, pairs)

    def pairs_and_logits(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The target's tokens beside what the model says there now, and the logits of both, in one pass.

        Returns:
            pairs: int64, ``[T, 2]``, the target's token and the negative.
            logits: ``[T, 2]``, with a gradient to ``weights``.
        """

        def pair(logits: Tensor) -> Tensor:
            return torch.stack((self.targets.to(logits.device), teacher_forced_negatives(logits)), dim=-1)

        if not self.replays:
            logits = self.target_logits(weights)[0]
            pairs = pair(logits.detach())
            return pairs, logits.gather(-1, pairs)

        found: list[Tensor] = []

        def head(hidden: Tensor) -> Tensor:
            with torch.no_grad():
                found.append(pair(self._output_forward(hidden)[0]))
            return self._rows(hidden, found[0])

        logits = self._run(weights, head)[0]
        return found[0], logits

    # ----------------------------------------------------------------------------------------------------------------

    def _run(self, weights: Mapping[str, Tensor] | None, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The model's logits; with a ``head``, what it makes of the hidden states that predict the target."""
        with ExitStack() as stack:
            if weights is not None:
                stack.enter_context(projecting_with(self.model, weights, self._lowest_input))
            elif self.replays:
                for layer, output in self._layer_outputs.items():
                    stack.enter_context(forward_as(layer, _returning(output)))
            if head is not None:
                stack.enter_context(forward_as(self._output_layer, lambda hidden: head(hidden[:, self.positions])))
            mask = torch.ones_like(self.input_ids)
            return self.model(input_ids=self.input_ids, attention_mask=mask, use_cache=False).logits

    def _rows(self, hidden: Tensor, pairs: Tensor) -> Tensor:
        """Two rows of the output layer a position, in float32: ``[1, T, d]`` → ``[1, T, 2]``."""
        weight = self._output_layer.weight
        if weight.is_meta:  # offloaded: only the module itself knows where its rows are
            return self._output_forward(hidden).gather(-1, pairs.unsqueeze(0))
        logits = (weight[pairs].float() * hidden[0].float().unsqueeze(1)).sum(-1)
        bias = getattr(self._output_layer, "bias", None)
        return (logits if bias is None else logits + bias[pairs].float()).unsqueeze(0)

    def _record(self) -> None:
        """One pass of the model as it is, which keeps what W cannot change, and the layers' outputs for the reference."""
        output_layer = self.model.get_output_embeddings()
        if output_layer is None:
            raise CannotReplay("it names no output layer")
        self._output_layer: Any = output_layer
        self._output_forward = self._output_layer.forward
        lowest_name = next(iter(self.weights)).removesuffix(".weight")
        lowest = self.model.get_submodule(lowest_name)
        layers = self._layers()
        own_layer = next((n for n in layers if lowest_name.startswith(n + ".")), None)
        if own_layer is None:
            raise CannotReplay(f"{lowest_name} is not inside {self.layer_template}")

        # Beside the layers below: everything that stands next to the way from W's own layer down to W.
        beside: list[nn.Module] = []
        container = own_layer
        for step in lowest_name.removeprefix(own_layer + ".").split("."):
            beside += [m for n, m in self.model.get_submodule(container).named_children() if n != step]
            container = f"{container}.{step}"

        outputs: dict[nn.Module, list[Any]] = {module: [] for module in (*layers.values(), *beside)}
        inputs: list[Tensor] = []
        before_w: list[nn.Module] = []

        def keep_output(module: nn.Module, _args: Any, output: Any) -> None:
            outputs[module].append(output)
            if not inputs:
                before_w.append(module)

        with ExitStack() as hooks:
            for module in outputs:
                hooks.callback(module.register_forward_hook(keep_output).remove)
            hooks.callback(lowest.register_forward_pre_hook(lambda _m, args: inputs.extend(args[:1])).remove)
            self._own_logits = self._run(None)[:, self.positions]

        if len(inputs) != 1 or any(len(outputs[layer]) != 1 for layer in layers.values()):
            raise CannotReplay("a layer or the edited projection does not run exactly once in a forward pass")
        self._lowest_input = inputs[0]
        self._layer_outputs = {layer: outputs[layer][0] for layer in layers.values()}
        self._constant_outputs = {m: outputs[m][0] for m in before_w if len(outputs[m]) == 1}

    def _layers(self) -> dict[str, nn.Module]:
        modules = dict(self.model.named_modules())
        names = (self.layer_template.format(n) for n in range(len(modules)))
        return {name: modules[name] for name in itertools.takewhile(modules.__contains__, names)}

    def _replay(self) -> None:
        for module, output in self._constant_outputs.items():
            self._restore.enter_context(forward_as(module, _returning(output)))
        self.replays = True

    def _check(self) -> None:
        versions = [tensor._version for tensor in self._kept_tensors()]
        own = self._own_logits
        try:
            replayed = self.target_logits(self.weights)
            reference = self.target_logits(None)
            pairs = torch.stack((self.targets, self.targets.flip(0)), dim=-1).to(own.device)
            rows = self.pair_logits(self.weights, pairs) if len(own) == 1 else None
        except Exception as error:  # whatever a model's code does not like of being replayed
            raise CannotReplay(f"its layers cannot be run on their own: {type(error).__name__}: {error}") from error
        if versions != [tensor._version for tensor in self._kept_tensors()]:
            raise CannotReplay("its layers change their inputs in place")
        scale = own.abs().max().item()
        allowed = scale * torch.finfo(own.dtype).eps ** 0.5 / 4
        errors = [(replayed - own).abs().max().item(), (reference - own).abs().max().item()]
        if rows is not None:
            errors.append((rows - own[0].gather(-1, pairs)).abs().max().item())
        if not max(errors) <= allowed:
            raise CannotReplay(f"the replayed logits differ by {max(errors):.2g} (of {scale:.2g}; {allowed:.2g} is allowed)")

    def _kept_tensors(self) -> list[Tensor]:
        kept = (self._lowest_input, *self._layer_outputs.values(), *self._constant_outputs.values())
        return [t for k in kept for t in (k if isinstance(k, (tuple, list)) else (k,)) if isinstance(t, Tensor)]


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


@contextmanager
def projecting_with(
    model: PreTrainedModel, weights: Mapping[str, Tensor], lowest_input: Tensor | None = None
) -> Iterator[None]:
    """For a block, let the model run with other weights W; they are cast to its dtype, with a gradient.

    Args:
        model: the model; its own weights are not touched.
        weights: W by name, lowest layer first.
        lowest_input: the input of the lowest W, where it is known already.
    """
    with ExitStack() as stack:
        given = lowest_input
        for name, weight in weights.items():
            projection = model.get_submodule(name.removesuffix(".weight"))
            stack.enter_context(forward_as(projection, _projecting(projection, weight, given)))
            given = None
        yield


def _projecting(projection: Any, weight: Tensor, given: Tensor | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        x = x if given is None else given
        cast = weight.to(x.dtype)
        return F.linear(x, cast.T if isinstance(projection, Conv1D) else cast, projection.bias)

    return forward
