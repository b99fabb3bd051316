"""Run only W and the layers above it, and of the tokens only those that a step is about.

During an edit only W changes, so whatever the model computes without W stays as it is: every layer below W's, and
inside W's own layer the attention and the projections that feed it. One recording pass keeps those outputs. A step is
then the model's own forward in which every such module returns what it returned before, and the last layer's MLP and the
output layer, which work on each position by itself, see the target's positions only. Because the model's own code runs,
masks, rotary tables, norms, soft-capping and logit scaling need no description here.

A change that is made for some tokens, such as a subject's last, does little to those before them. Steps that leave that little
out run the tokens from there on alone: what stands before is kept as keys and values, which the model is given as its cache.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.pytorch_utils import Conv1D

from .config import HParamsError
from .weights import Weights, stored, users

LOG = logging.getLogger(__name__)


class Change(Protocol):
    """A change of a projection, in an edit under way."""

    def added_to(self, output: Tensor, keys: Tensor) -> Tensor:
        """The changed projection's output, from its own and its input: ``[B, L, out]`` and ``[B, L, in]``."""


#: The edited weights in an edit under way: W itself, or a change of it.
EditedWeights = Mapping[str, "Tensor | Change"]


#: The modules that hold each edited weight: one, or several that are tied.
Projections = Mapping[str, Sequence[nn.Module]]


class CannotReplay(Exception):
    """The model does not run as the replay needs it to; the first argument says why, the second may hold figures."""

    def __str__(self) -> str:
        return " ".join(self.args)


# Of every model, the reasons that the log has told.
_TOLD: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


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


@dataclass
class _Pass:
    """A way to run the model.

    Attributes:
        input_ids: int64, ``[B, L]``.
        at: where the target is predicted from: an index that leads from ``[B, L, …]`` to ``[B, T, …]``.
        others: the model's other arguments.
        lowest_input: the input of the lowest W, where it is known already.
        kept: what modules give in this pass, without being run.
        narrowed: a module that works on each position by itself, and is to see the target's only.
    """

    input_ids: Tensor
    at: tuple[Any, Any]
    others: dict[str, Any]
    lowest_input: Tensor | None = None
    kept: dict[nn.Module, Any] = field(default_factory=dict)
    narrowed: nn.Module | None = None


class Suffix:
    """A causal language model on one batch of sequences, as a function of the edited weights alone.

    Use it as a context manager, inside :func:`frozen`: within the block the model's linear layers are oneDNN's, and
    afterwards they are as they were. The model's weights are never touched.

    Args:
        model: the model.
        weights: the edited weights by name, lowest layer first, as they stand in the model.
        layer_template: a decoder layer's name with ``{}`` for its number.
        mlp_template: that of its MLP.
        input_ids: int64, ``[B, L]``. A shorter sequence is padded on its right, where nothing before the padding sees it.
        prompt_length: P, of every sequence or of each; positions P−1 … P+T−2 predict the T target tokens, the longest's last.
        starts: of each sequence the position, below P, from which on steps run it; left out, they run all of it.
        targets: T, of each; left out, all have the same. What is found beyond a shorter one's means nothing.

    Attributes:
        own_logits: what the model as it stands gives at the target's positions, ``[B, T, V]``: the reference.
        inputs: what each edited weight is given then, ``[B, L − 1, in]``, or that flattened.
        uses: how often a forward pass runs each edited weight.
        replays: whether steps run W and the layers above it only.
        starts: None where steps run all positions.

    On entering, the replay is checked: with the weights as they stand it must give the model's own logits. Where it does
    not, or where the model cannot be replayed, every call is a plain full forward with the same results, and the log says
    why, once a model. With ``starts`` that would not, the next best is steps that run all positions. What all this stands on is
    checked as well: W's module must compute x Wᵀ + b, and a full forward in which it is made to must give the model's own
    logits.

    Raises:
        HParamsError: on entering, where that is not so. No edit of such a model could be trusted.
    """

    own_logits: Tensor
    inputs: dict[str, Tensor]
    uses: dict[str, int]

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Weights,
        layer_template: str,
        mlp_template: str,
        input_ids: Tensor,
        prompt_length: int | Sequence[int],
        starts: Sequence[int] | None = None,
        targets: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.projections: Projections = {name: users(model, name) for name in weights}
        self.layer_template = layer_template
        self.mlp_template = mlp_template
        self.prompt_length = prompt_length
        self.starts = starts if starts and any(starts) else None
        ids = input_ids[:, :-1]  # nothing is predicted from the last token
        others = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        # The model with all that it does. What runs the whole, and what steps run, is the same at best, and never more.
        self.targets = targets
        self._plain = _Pass(ids, _predicting(prompt_length, ids.shape[1], targets), others)
        self._whole = self._steps = self._plain
        self.replays = False
        self._last_mlp: nn.Module | None = None
        self._cache: DynamicCache | None = None
        self._from_start: _Pass | None = None
        self._selected = list(range(len(ids)))
        self._restore = ExitStack()

    def __enter__(self) -> Suffix:
        with torch.no_grad():
            try:
                self._restore.enter_context(linear_by_onednn(self.model))
                self._record()
                self._replay()
            except CannotReplay as reason:
                self._restore.close()
                self.replays, self.starts = False, None
                self._whole = self._steps = self._plain
                self._run_whole(reason)
            except BaseException:
                self._restore.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def target_logits(self, weights: EditedWeights) -> Tensor:
        """The logits that predict the target's tokens, by the full output layer, from a pass over the whole: ``[B, T, V]``."""
        return self._logits(self._whole, weights)

    def step_logits(self, weights: EditedWeights) -> Tensor:
        """The same from the positions that steps run; it has a gradient to the weights."""
        return self._logits(self._steps, weights)

    def pair_logits(self, weights: EditedWeights, pairs: Tensor) -> Tensor:
        """The logits of two tokens a position, from two rows of the output layer and the positions that steps run.

        Args:
            weights: W, as float32 leaves, or changes of it; the result has a gradient to them.
            pairs: int64, ``[B, T, 2]``, or ``[T, 2]`` of one sequence.

        Returns:
            Float32, of the same shape.
        """
        of_batch = pairs if pairs.dim() == 3 else pairs.unsqueeze(0)
        if not self.replays:
            return self.target_logits(weights).gather(-1, of_batch).float().view_as(pairs)
        return self._forward(self._steps, weights, lambda hidden: self._rows(hidden, of_batch)).view_as(pairs)

    @property
    def length(self) -> int:
        """L − 1."""
        return self._plain.input_ids.shape[1]

    def at(self, rows: Sequence[int], places: Sequence[Sequence[int]]) -> Tensor:
        """Where positions of some sequences are in steps that run these: among all positions of all of them; int64 ``[n]``."""
        starts = [0] * self._plain.input_ids.shape[0] if self.starts is None else self.starts
        length = self._steps.input_ids.shape[1]
        return torch.tensor([n * length + at - starts[row] for n, row in enumerate(rows) for at in places[n]])

    def select(self, rows: Sequence[int]) -> None:
        """Let steps run some of the sequences only, as long as they start somewhere; ``rows`` is none too many."""
        if self._from_start is None or list(rows) == self._selected:
            return
        self._selected, count = list(rows), len(self._plain.input_ids)
        if self._selected == list(range(count)):
            self._steps = self._from_start
            return
        length = self._from_start.input_ids.shape[1]

        def some(kept: Any) -> Any:
            if isinstance(kept, (tuple, list)):
                return tuple(map(some, kept))
            if isinstance(kept, Tensor) and kept.shape[:1] == (count,):
                return kept[torch.tensor(rows, device=kept.device)]
            if isinstance(kept, Tensor) and kept.shape[:1] == (count * length,):
                return some(kept.unflatten(0, (count, length))).flatten(0, 1)
            if isinstance(kept, Cache):
                layers: list[Any] = kept.layers
                return Cache(layers=[_Before(some(layer.keys), some(layer.values)) for layer in layers])
            return kept

        whole, at = self._from_start, self._from_start.at
        if isinstance(at[1], Tensor):
            at = torch.arange(len(rows)).unsqueeze(-1), at[1][torch.tensor(rows)]
        others = {name: some(value) for name, value in whole.others.items()}
        kept = {module: some(output) for module, output in whole.kept.items()}
        self._steps = _Pass(some(whole.input_ids), at, others, some(whole.lowest_input), kept, whole.narrowed)

    # ----------------------------------------------------------------------------------------------------------------

    def _logits(self, how: _Pass, weights: EditedWeights) -> Tensor:
        return self._forward(how, weights, self._output_forward) if self.replays else self._forward(how, weights)[how.at]

    def _forward(
        self, how: _Pass, weights: EditedWeights | None = None, head: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The model's logits; with a ``head``, what it makes of the hidden states that predict the target."""
        with ExitStack() as stack:
            for module, output in how.kept.items():
                stack.enter_context(forward_as(module, _returning(output)))
            if how.narrowed is not None:
                stack.enter_context(forward_as(how.narrowed, _narrow(how, how.narrowed.forward)))
            if weights is not None:
                stack.enter_context(projecting_with(self.projections, weights, how.lowest_input))
            if head is not None:
                stack.enter_context(forward_as(self._output_layer, lambda hidden: head(_at_target(how, hidden))))
            return self.model(input_ids=how.input_ids, **how.others).logits

    def _rows(self, hidden: Tensor, pairs: Tensor) -> Tensor:
        """Two rows of the output layer a position, in float32: ``[B, T, d]`` → ``[B, T, 2]``."""
        weight = self._output_layer.weight
        if weight.is_meta or type(self._output_layer) is not nn.Linear:
            # Offloaded, or more than its weight: only the module's own forward knows its rows.
            logits = self._output_forward(hidden)
            return logits.gather(-1, pairs.to(logits.device)).float()
        hidden, pairs = hidden.to(weight.device), pairs.to(weight.device)  # of a model on several devices
        logits = (weight[pairs].float() * hidden.float().unsqueeze(-2)).sum(-1)
        bias = getattr(self._output_layer, "bias", None)
        return logits if bias is None else logits + bias[pairs].float()

    def _record(self) -> None:
        """One pass of the model as it is, which keeps what W cannot change."""
        output_layer = self.model.get_output_embeddings()
        if output_layer is None:
            raise CannotReplay("it names no output layer")
        self._output_layer: Any = output_layer
        self._output_forward = output_layer.forward
        lowest_name = next(iter(self.weights)).removesuffix(".weight")
        lowest = self.model.get_submodule(lowest_name)
        layers = self._layers()
        own_layer = next((n for n in layers if lowest_name.startswith(n + ".")), None)
        if own_layer is None:
            raise CannotReplay(f"{lowest_name} is not inside {self.layer_template}")

        # Constant are the layers below, and in W's own layer everything that stands beside the way down to W and runs
        # before it.
        candidates = list(layers.values())[: list(layers).index(own_layer)]
        container = own_layer
        for step in lowest_name.removeprefix(own_layer + ".").split("."):
            candidates += [m for n, m in self.model.get_submodule(container).named_children() if n != step]
            container = f"{container}.{step}"

        outputs: dict[nn.Module, list[Any]] = {module: [] for module in candidates}
        inputs: list[Tensor] = []
        last_mlp_name = self.mlp_template.format(len(layers) - 1)
        last_mlp = dict(self.model.named_modules()).get(last_mlp_name)
        last_mlp_shapes: list[Any] = []

        def keep_output(module: nn.Module, _args: Any, output: Any) -> None:
            if not inputs:
                outputs[module].append(output)

        with ExitStack() as hooks:
            for module in candidates:
                hooks.callback(module.register_forward_hook(keep_output).remove)
            hooks.callback(lowest.register_forward_pre_hook(lambda _m, args: inputs.extend(args[:1])).remove)
            if last_mlp is not None:
                hooks.callback(
                    last_mlp.register_forward_hook(lambda _m, args, output: last_mlp_shapes.extend((*args, output))).remove
                )
            how, failed = self._plain, None
            if self.starts is not None:
                self._cache = DynamicCache()
                how = replace(how, others={**how.others, "past_key_values": self._cache, "use_cache": True})
            try:
                self.own_logits = self._own(how, self._output_forward)
            except (HParamsError, CannotReplay):
                raise
            except Exception as error:  # whatever a model's code does not like of the cache
                if self.starts is None:
                    raise
                failed = CannotReplay("it does not take a cache:", f"{type(error).__name__}: {error}")
        if failed is not None:
            self._run_all_tokens(failed)
            return self._record()

        if any(times != 1 for times in self.uses.values()):
            raise CannotReplay("an edited projection runs more than once in a forward pass")
        if len(inputs) != 1 or any(len(kept) > 1 for kept in outputs.values()):
            raise CannotReplay("a module beside the edited projection runs more than once in a forward pass")
        self._lowest_input = inputs[0]
        self._constant_outputs = {module: kept[0] for module, kept in outputs.items() if kept}
        match last_mlp_shapes:
            case [Tensor() as hidden, Tensor() as output] if hidden.shape == output.shape:
                holds_w = any(name.startswith(last_mlp_name + ".") for name in self.weights)
                self._last_mlp = None if holds_w else last_mlp

    def _layers(self) -> dict[str, nn.Module]:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        names = (self.layer_template.format(n) for n in range(len(modules)))
        return {name: modules[name] for name in itertools.takewhile(modules.__contains__, names)}

    def _replay(self) -> None:
        """Let steps run as little as gives the model's own logits."""
        self.replays = True
        if self.starts is not None:
            try:
                self._steps = self._from_start = self._from(self.starts)
                self._check()
            except CannotReplay as reason:
                self._run_all_tokens(reason)
            else:
                # Of the whole all is run: whether what is kept would do there, too, would take as long to check.
                self._whole = replace(self._plain, narrowed=self._last_mlp)
                return
        self._whole = self._steps = replace(
            self._plain, lowest_input=self._lowest_input, kept=self._constant_outputs, narrowed=self._last_mlp
        )
        self._check()

    def _run_all_tokens(self, reason: CannotReplay) -> None:
        self.starts = self._cache = self._from_start = None
        self._tell("every step runs all tokens", reason)

    def _from(self, starts: Sequence[int]) -> _Pass:
        """A pass over the tokens from ``starts`` on, aligned there: the tokens before them are in the model's cache."""
        ids = self._plain.input_ids
        rows, length = ids.shape
        targets = self.targets or [self.own_logits.shape[1]] * rows
        prompts = [self.prompt_length] * rows if isinstance(self.prompt_length, int) else self.prompt_length
        first, end = torch.tensor(starts).unsqueeze(-1), torch.tensor(prompts).unsqueeze(-1)
        end += torch.tensor(targets).unsqueeze(-1) - 1
        # Beyond a sequence's end its last token is repeated, where nothing sees it.
        places = (first + torch.arange((end - first).max().item())).minimum(end - 1)
        before = torch.arange(first.max().item()) - (first.max() - first)  # below 0 where a shorter one is padded, on its left
        row = torch.arange(rows).unsqueeze(-1)

        def cut(kept: Any) -> Any:
            if isinstance(kept, (tuple, list)):
                return tuple(map(cut, kept))
            if isinstance(kept, Tensor) and kept.shape[:2] == (rows, length):
                return kept[row.to(kept.device), places.to(kept.device)]
            if isinstance(kept, Tensor) and kept.shape[:1] == (rows * length,):
                return cut(kept.unflatten(0, (rows, length))).flatten(0, 1)
            return kept

        def earlier(kept: Tensor | None) -> Tensor:
            if kept is None or kept.dim() != 4 or (kept.shape[0], kept.shape[2]) != (rows, length):
                raise CannotReplay("its cache has no keys and values of the usual shape")
            return kept.transpose(1, 2)[row.to(kept.device), before.clamp_min(0).to(kept.device)].transpose(1, 2).contiguous()

        names = list(self._layers())
        own = next(n for n, name in enumerate(names) if next(iter(self.weights)).startswith(name + "."))
        cached: list[Any] = self._cache.layers if self._cache is not None else []
        self._cache = None
        if len(cached) != len(names):
            raise CannotReplay("it does not keep keys and values of every layer")
        above = [(earlier(layer.keys), earlier(layer.values)) for layer in cached[own + 1 :] or cached[own:]]
        below = [above[0]] * (len(names) - len(above))  # which nothing reads but for their length
        others = {
            "attention_mask": torch.cat((before >= 0, torch.ones_like(places, dtype=torch.bool)), dim=1).to(ids),
            "past_key_values": Cache(layers=[_Before(*pair) for pair in below + above]),
            "use_cache": True,
        }
        if "position_ids" in signature(self.model.forward).parameters:
            others["position_ids"] = places.to(ids.device)
        relative = [prompt - start for prompt, start in zip(prompts, starts)]
        alike = len(set(relative)) == len(set(targets)) == 1
        at = _predicting(relative[0] if alike else relative, places.shape[1], targets)
        kept = {module: cut(output) for module, output in self._constant_outputs.items()}
        return _Pass(cut(ids), at, others, cut(self._lowest_input), kept, self._last_mlp)

    def _check(self) -> None:
        versions = [tensor._version for tensor in self._kept_tensors()]
        own = self.own_logits.float()
        try:
            pairs = torch.stack((own.argmax(-1), own.argmin(-1)), dim=-1)
            own = own.gather(-1, pairs)
            replayed = self.pair_logits(self.weights, pairs)
        except Exception as error:  # whatever a model's code does not like of being replayed
            raise CannotReplay("its layers cannot be run on their own:", f"{type(error).__name__}: {error}") from error
        if versions != [tensor._version for tensor in self._kept_tensors()]:
            raise CannotReplay("its layers change their inputs in place")
        if self.targets is not None:
            real = torch.arange(own.shape[1]) < torch.tensor(self.targets).unsqueeze(-1)
            own, replayed = own[real.to(own.device)], replayed[real.to(replayed.device)]
        differing = self._differing(own, replayed)
        if differing:
            raise CannotReplay("the replayed logits differ", differing)

    def _differing(self, own: Tensor, other: Tensor) -> str:
        """By how much logits differ that should be the same, in words; nothing where they do not, or are no numbers at all."""
        if not torch.isfinite(own).all():
            return ""
        scale, difference = own.abs().max().item(), (other.to(own.device) - own).abs().max().item()
        allowed = scale * max(torch.finfo(dtype).eps for dtype in (self.own_logits.dtype, own.dtype)) ** 0.5 / 4
        return "" if difference <= allowed else f"by {difference:.2g} (of {scale:.2g}; {allowed:.2g} is allowed)"

    def _run_whole(self, reason: CannotReplay) -> None:
        """Let every call be a full forward, if W can be given to the model at all."""
        self._tell("every step runs the whole model", reason)
        logits, length = self._own(self._plain), self._plain.input_ids.shape[1]
        if logits.dim() != 3 or logits.shape[1] != length:
            raise HParamsError(
                f"{type(self.model).__name__} gives logits of shape {list(logits.shape)} for {length} tokens; "
                "an edit needs those of every position"
            )
        self.own_logits = logits[self._plain.at]
        differing = self._differing(self.own_logits.float(), self.target_logits(self.weights).float())
        if differing:
            kinds = ", ".join(sorted({type(m).__name__ for modules in self.projections.values() for m in modules}))
            raise HParamsError(
                f"the logits of {type(self.model).__name__} differ {differing} where x Wᵀ + b takes the place of the edited "
                f"{kinds}: they are not a function of that weight alone, or not the same from run to run"
            )

    def _tell(self, what: str, reason: CannotReplay) -> None:
        told = _TOLD.setdefault(self.model, set())
        if reason.args[0] not in told:
            told.add(reason.args[0])
            LOG.warning("%s, here and in later edits of it: %s", what, reason)

    def _own(self, how: _Pass, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """One pass of the model as it is, in which the modules that hold W are watched.

        Raises:
            HParamsError: one of them computes something else than x Wᵀ + b, or W is not run.
        """
        self.uses, self.inputs = dict.fromkeys(self.projections, 0), {}
        with ExitStack() as stack:
            for name, modules in self.projections.items():
                for module in modules:
                    stack.enter_context(forward_as(module, self._watched(name, module)))
            logits = self._forward(how, head=head)
        for name, times in self.uses.items():
            if not times:
                kind = type(self.projections[name][0]).__name__
                raise HParamsError(
                    f"{name}: its module, of type {kind}, is not run in a forward pass of {type(self.model).__name__}, which "
                    "uses the weight in another way, or not for this prompt: it cannot be edited"
                )
        return logits

    def _watched(self, name: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = forward(x, *args, **kwargs)
            self.uses[name] += 1
            self.inputs[name] = x
            if not _is_projection(module, self.weights[name], x, output):
                raise HParamsError(
                    f"{name} is the weight of a module of type {type(module).__module__}.{type(module).__name__}, which "
                    "computes something else than x Wᵀ + b: load the model with a plain torch.nn.Linear there, neither "
                    "quantised nor scaled"
                )
            return output

        return watched

    def _kept_tensors(self) -> list[Tensor]:
        kept = (self._steps.lowest_input, *self._steps.kept.values())
        return [t for k in kept for t in (k if isinstance(k, (tuple, list)) else (k,)) if isinstance(t, Tensor)]


class _Before(DynamicLayer):
    """A layer's part of a model's cache that stays as it is: keys and values of the tokens before, ``[B, heads, m, width]``."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._before = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._before
        return torch.cat((keys, key_states), dim=-2), torch.cat((values, value_states), dim=-2)


def _narrow(how: _Pass, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A module that works on each position by itself, run on the target's positions; the others' outputs are 0."""

    def narrowed(hidden: Tensor) -> Tensor:
        at_target = forward(_at_target(how, hidden))
        output = torch.zeros_like(hidden, device=at_target.device)
        output[how.at] = at_target
        return output

    return narrowed


def _at_target(how: _Pass, hidden: Tensor) -> Tensor:
    if hidden.dim() != 3 or hidden.shape[1] != how.input_ids.shape[1]:
        raise CannotReplay("its output layer is not given the hidden states of all positions")
    # With a slice's strides, torch would multiply batch by batch, and copy the output layer for it.
    return hidden[how.at].clone(memory_format=torch.contiguous_format)


def _predicting(prompt_length: int | Sequence[int], length: int, targets: Sequence[int] | None = None) -> tuple[Any, Any]:
    """Where, in a tensor ``[B, L − 1, …]``, the target is predicted from: an index that leads to ``[B, T, …]``."""
    if isinstance(prompt_length, int):
        return slice(None), slice(prompt_length - 1, None)
    first = torch.tensor(prompt_length).unsqueeze(-1)
    longest = length - int(first.max()) + 1 if targets is None else max(targets)
    # Beyond a shorter one's end there need not be as many positions.
    return torch.arange(len(first)).unsqueeze(-1), (torch.arange(longest) + first - 1).clamp(max=length - 1)


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


@contextmanager
def linear_by_onednn(model: nn.Module) -> Iterator[None]:
    """For a block, let all of a model's linear layers be :func:`_linear`; not those in which accelerate keeps a forward."""
    with ExitStack() as stack:
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                stack.enter_context(forward_as(module, _by_onednn(module)))
        yield


def _by_onednn(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: _linear(x, linear.weight, linear.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, by oneDNN in float32 on the CPU: there torch takes another library, which is slower for few rows."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return F.linear(x.to_mkldnn(), weight, bias).to_dense()
    return F.linear(x, weight, bias)


def _is_projection(module: nn.Module, weight: Tensor, x: Any, output: Any) -> bool:
    """Whether a module's output is x Wᵀ + b, as torch computes it in the same dtype."""
    if not (isinstance(x, Tensor) and isinstance(output, Tensor) and x.is_floating_point()):
        return False
    x, weight, bias = x.to(output.device), weight.to(output.device), stored(module, "bias")
    try:
        expected = F.linear(
            x, weight.T if isinstance(module, Conv1D) else weight, None if bias is None else bias.to(output.device)
        )
    except RuntimeError:  # of another shape or dtype
        return False
    if expected.shape != output.shape:
        return False
    # Beyond float16's range both are infinite.
    found, expected = (t.float().nan_to_num() for t in (output, expected))
    allowed = max(torch.finfo(output.dtype).eps, 1e-4)
    return bool((found - expected).norm() <= allowed * expected.norm())


@contextmanager
def projecting_with(projections: Projections, weights: EditedWeights, lowest_input: Tensor | None = None) -> Iterator[None]:
    """For a block, let a model run with other weights W.

    Args:
        projections: the modules that hold W, by its names; their own weights are not touched.
        weights: W by name, lowest layer first, cast to the model's dtype with a float32 gradient; or changes of it.
        lowest_input: the input of the lowest W, where it is known already.
    """
    with ExitStack() as stack:
        given = lowest_input
        for name, weight in weights.items():
            used = itertools.count()
            for projection in projections[name]:
                stack.enter_context(forward_as(projection, _projecting(projection, weight, given, used)))
            given = None
        yield


def runs_by_rows(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether :func:`projecting_by_rows` can run a model with other weights of these names."""
    modules = [module for name in names for module in users(model, name)]
    return all(type(m) in (nn.Linear, Conv1D) and "forward" not in vars(m) and not m.weight.is_meta for m in modules)


@contextmanager
def projecting_by_rows(model: nn.Module, variants: Sequence[Mapping[str, Tensor]]) -> Iterator[Callable[[Sequence[int]], None]]:
    """For a block, let every row of a batch run with weights of its own, as several models would.

    Args:
        model: one that :func:`runs_by_rows`.
        variants: of each, the weights that it has in place of the model's, by name.

    Yields:
        What is to be called before a run with the number of every row's variant.
    """
    rows: dict[int, list[int]] = {}

    def choose(of_rows: Sequence[int]) -> None:
        rows.clear()
        for row, variant in enumerate(of_rows):
            rows.setdefault(variant, []).append(row)

    def projecting(module: Any, name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            by_row = x.reshape(sum(map(len, rows.values())), -1, x.shape[-1])  # some models flatten rows and positions
            output = None
            for variant, its in rows.items():
                weight = variants[variant].get(name, module.weight)
                part = _linear(by_row[its], weight.T if isinstance(module, Conv1D) else weight, module.bias)
                if output is None:
                    output = part.new_empty(*by_row.shape[:-1], part.shape[-1])
                output[its] = part
            return output.view(*x.shape[:-1], -1)  # type: ignore[union-attr]

        return forward

    with ExitStack() as stack:
        for name in {name for weights in variants for name in weights}:
            for module in users(model, name):
                stack.enter_context(forward_as(module, projecting(module, name)))
        yield choose


def _projecting(
    projection: nn.Module, weight: Tensor | Change, given: Tensor | None, used: Iterator[int]
) -> Callable[[Tensor], Tensor]:
    if not isinstance(weight, Tensor):
        own: Callable[[Tensor], Tensor] = projection.forward

        def changed(x: Tensor) -> Tensor:
            x = x if given is None else given
            return weight.added_to(own(x), x)

        return changed
    bias = stored(projection, "bias")

    def forward(x: Tensor) -> Tensor:
        x = (x if given is None else given).to(weight.device)
        last_gradient = weight.grad if next(used) == 0 else None
        return _Project.apply(
            x, weight, None if bias is None else bias.to(x.device), isinstance(projection, Conv1D), last_gradient
        )

    return forward


class _Project(torch.autograd.Function):
    """x Wᵀ + b in the dtype of x, with the gradient of W in W's own: a sum over tokens of products needs float32.

    With ``transposed``, W is stored as GPT-2's Conv1D does, ``[in, out]``. The gradient goes into the memory of ``buffer``, of
    one use of W in a pass alone: fresh memory takes longer to touch than to compute.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, buffer: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.buffer = transposed, buffer
        cast = weight.to(x.device, x.dtype)
        return F.linear(x, cast.T, bias) if transposed else _linear(x, cast, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        to_x = None
        if ctx.needs_input_grad[0]:
            cast = weight.to(gradient.device, gradient.dtype)
            to_x = gradient @ (cast.T if ctx.transposed else cast)
        inputs, outputs = (rows.flatten(0, -2).to(weight.dtype) for rows in (x, gradient))
        # In the layout of W itself: the fused Adam reads a transposed gradient as if it were not.
        left, right = (inputs, outputs) if ctx.transposed else (outputs, inputs)
        return to_x, torch.mm(left.T, right, out=ctx.buffer).to(weight.device), None, None, None
