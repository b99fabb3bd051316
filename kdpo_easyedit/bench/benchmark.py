"""What an edit costs: the straightforward form of the method against this package's, in one run.

``kdpo benchmark`` makes the same edit in both forms on one model of random weights, several times in
turn, and prints the medians, their ratios, and the floor: the time in which this machine could move the bytes, or do the
operations, that a step cannot do without. With ``--mom2`` it makes the edit with KDPO and with KDPO+C instead.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from ..devices import synchronize
from ..method.config import KDPOHyperParams
from ..method.kdpo import execute, execute_kdpo
from ..method.kdpo_c import Usage
from ..method.replay import linear_by_onednn
from ..method.weights import runs_on
from .peak import PeakMemory


@dataclass(frozen=True)
class Shape:
    """A model's architecture and the layer that is edited."""

    config: PreTrainedConfig
    layer: int


def llama(width: int, inner: int, layers: int, heads: int, vocabulary: int, **others: Any) -> LlamaConfig:
    """A configuration of Llama's layout."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        **others,
    )


SHAPES = {
    "qwen1.5-0.5b": Shape(
        Qwen2Config(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        layer=21,
    ),
    "llama-3.2-1b": Shape(llama(2048, 8192, 16, 32, 128256, num_key_value_heads=8, tie_word_embeddings=True), layer=10),
    "llama-2-7b": Shape(llama(4096, 11008, 32, 32, 32000), layer=21),
    # Four layers of Llama-3-8B's, one of them above the edited one instead of ten: an edit costs less than the real one.
    "llama-3-8b-cut": Shape(llama(4096, 14336, 4, 32, 8000), layer=2),
    # Llama-2-7B's ratios at an eighth of its width and three eighths of its depth.
    "small": Shape(llama(512, 1376, 12, 8, 8000), layer=8),
    # A quarter of that width: in half precision, which most processors emulate, larger ones take minutes.
    "tiny": Shape(llama(128, 344, 12, 2, 1000), layer=8),
}


@dataclass(frozen=True)
class Cost:
    """What one form of the edit costs: medians over the repetitions.

    Attributes:
        step: seconds a step.
        edit: seconds of a whole edit: negatives, all its steps, and the look at what the model says then.
        memory: peak bytes of tensors beyond the loaded model.
    """

    step: float
    edit: float
    memory: int


@dataclass(frozen=True)
class Result:
    """Both costs, the floor of a step in seconds, and by how much the two forms' losses differ at most."""

    straightforward: Cost
    engine: Cost
    floor: float
    loss_difference: float
    weight_bytes: int


def straightforward_edit(
    model: PreTrainedModel, input_ids: Tensor, prompt_length: int, weight_name: str, hparams: KDPOHyperParams
) -> list[float]:
    """One cycle of the method as it is written down, with a second model for the reference.

    Policy and reference each run the two sequences of a pair, in one batch, through the whole model and its output layer,
    and take log-probabilities at all positions, of which the labels select some, as is usual for DPO.
    The model is left as it was.

    Args:
        model: a causal language model, frozen but for the weight that is edited.
        input_ids: prompt and target; int64, ``[1, L]``.
        prompt_length: P.
        weight_name: of W.
        hparams: ``num_steps``, ``lr`` and ``beta`` are read.

    Returns:
        The loss before every step.
    """
    reference = deepcopy(model)
    weight = model.get_parameter(weight_name)
    original = weight.detach().clone()
    optimizer = torch.optim.Adam([weight], lr=hparams.lr)
    positions = slice(prompt_length - 1, -1)
    losses: list[float] = []

    with torch.no_grad():
        negatives = model(input_ids).logits[:, positions].argmax(-1)
    pair = input_ids.repeat(2, 1)
    labels = pair[:, 1:].clone()
    labels[1, prompt_length - 1 :] = negatives[0]
    selected = torch.zeros_like(labels)
    selected[:, prompt_length - 1 :] = labels[0, prompt_length - 1 :] != labels[1, prompt_length - 1 :]

    def log_ratio(of: PreTrainedModel) -> Tensor:
        log_probs = of(pair).logits[:, :-1].float().log_softmax(-1)
        chosen, rejected = (log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1) * selected).sum(-1)
        return chosen - rejected

    for _ in range(hparams.num_steps):
        with torch.no_grad():
            reference_ratio = log_ratio(reference)
        loss = -F.logsigmoid(hparams.beta * (log_ratio(model) - reference_ratio))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model(input_ids).logits[:, positions].argmax(-1)
        weight.copy_(original)
    weight.grad = None
    return losses


def measure(model: PreTrainedModel, hparams: KDPOHyperParams, tokens: int = 18, targets: int = 4, repeats: int = 3) -> Result:
    """Make one edit of random tokens in both forms, in turn.

    Args:
        model: with its weights; they are as they were afterwards.
        hparams: of the edit; ``num_steps`` steps in one cycle are made.
        tokens: L, of prompt and target.
        targets: T, how many of them are the target's.
        repeats: how often each form is timed.
    """
    device = runs_on(model.get_input_embeddings())
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    request = {
        "prompt": " ".join(map(str, ids[0, :-targets].tolist())),
        "target_new": " ".join(map(str, ids[0, -targets:].tolist())),
    }
    ids = ids.to(device)
    (name,) = hparams.edited_parameters(model)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name == name)
    model.eval()
    once = replace(hparams, cycles=1, stop_crit=False)

    def straightforward() -> list[float]:
        return straightforward_edit(model, ids, tokens - targets, name, once)

    def engine() -> list[float]:
        return execute_kdpo(model, _numbers, request, once)[1].losses[0]

    forms = (straightforward, engine)
    losses = [form() for form in forms]  # also warms up
    edits: dict[Callable, list[float]] = {form: [] for form in forms}
    steps: dict[Callable, list[float]] = {form: [] for form in forms}
    for _ in range(repeats):
        for form in forms:
            ends: list[float] = []
            hook = register_optimizer_step_post_hook(lambda *_, ends=ends: ends.append(_now()))
            edits[form].append(_seconds(form))
            hook.remove()
            steps[form] += [after - before for before, after in itertools.pairwise(ends)]

    def cost(form: Callable) -> Cost:
        return Cost(statistics.median(steps[form]), statistics.median(edits[form]), _peak_memory(form, device))

    return Result(
        cost(straightforward),
        cost(engine),
        _floor(model, name, hparams.layers[0], hparams.layer_module_tmp, tokens),
        max(abs(a - b) for a, b in zip(*losses)),
        model.get_parameter(name).numel() * 4,
    )


@dataclass(frozen=True)
class UsageCost:
    """What KDPO+C costs beside KDPO, in seconds, medians over the repetitions.

    Attributes:
        factorisation: of the statistics, once a model.
        inverse: bytes of its result, kept in memory.
        plain, aware: an edit with KDPO, and with KDPO+C.
        products, update: of the latter, S times the keys, and letting them count.
    """

    factorisation: float
    inverse: int
    plain: float
    aware: float
    products: float
    update: float


def measure_usage(model: PreTrainedModel, hparams: KDPOHyperParams, tokens: int = 18, repeats: int = 3) -> UsageCost:
    """Make one edit of random tokens with KDPO and with KDPO+C, in turn, on statistics of random keys.

    Args:
        model: with its weights; they are as they were afterwards.
        hparams: of KDPO's edit; ``num_steps`` steps in one cycle are made.
        tokens: of prompt and target.
        repeats: how often each is timed.
    """
    name = next(iter(hparams.edited_parameters(model)))
    generator = torch.Generator().manual_seed(0)
    width = model.config.intermediate_size
    # As spread as real ones are: the largest directions have a thousand times the smallest.
    rows = torch.randn(width, width, generator=generator) * torch.logspace(0, -1.5, width)
    moment = rows.T @ rows / width
    del rows
    started = _now()
    usage = Usage.of(moment, hparams.mom2_damping, hparams.mom2_edit_weight)
    factorisation = _now() - started
    request = {
        "prompt": " ".join(map(str, range(tokens - 4))),
        "target_new": " ".join(map(str, range(tokens, tokens + 4))),
    }
    once = replace(hparams, cycles=1, stop_crit=False)
    keys = torch.randn(tokens - 1, width, generator=generator)
    times: dict[str, list[float]] = {key: [] for key in ("plain", "aware", "products", "update")}
    aware = replace(once, mom2_adjustment=True)
    for _ in range(repeats + 1):
        times["plain"].append(_seconds(execute, model, _numbers, [request], once, {}))
        times["aware"].append(_seconds(execute, model, _numbers, [request], aware, {name: usage}))
        times["products"].append(_seconds(usage.times, keys))
        times["update"].append(_seconds(usage.protecting, keys))
    medians = {key: statistics.median(found[1:]) for key, found in times.items()}  # the first warmed up
    return UsageCost(factorisation, usage.inverse.nbytes, **medians)


def _numbers(text: str, add_special_tokens: bool = True, return_special_tokens_mask: bool = False) -> dict[str, list[int]]:
    """A tokenizer of texts that are token numbers."""
    ids = [int(word) for word in text.split()]
    return {"input_ids": ids, "special_tokens_mask": [0] * len(ids)}


def _now() -> float:
    """Seconds, once the device has done what it was told."""
    synchronize()
    return time.perf_counter()


def _seconds(function: Callable, *arguments: Any, now: Callable[[], float] = _now) -> float:
    started = now()
    function(*arguments)
    return now() - started


def _peak_memory(form: Callable, device: torch.device) -> int:
    """The most bytes of tensors that lived at once, beyond those that lived before."""
    if device.type == "cuda":
        peak = PeakMemory(device)
        form()
        return peak.bytes() or 0
    with profile(profile_memory=True, acc_events=True) as recording:
        form()
    now = most = 0
    events = recording.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _floor(model: PreTrainedModel, weight_name: str, layer: int, layer_template: str, tokens: int) -> float:
    """The seconds that a step takes at least, from bytes moved and operations done at the speeds measured now.

    Of the layers above W, a step reads every weight twice (forward, and backward for the gradient of what flows in) and does
    two operations a weight and token each time; of W it reads the weight, and Adam reads and writes it, its gradient and
    two moments, in float32; forward and gradient are two operations a weight and token each.
    """
    weight = model.get_parameter(weight_name)
    above = sum(
        parameter.numel()
        for number in range(layer + 1, model.config.num_hidden_layers)
        for parameter in model.get_submodule(layer_template.format(number)).parameters()
    )
    moved = 2 * above * weight.element_size() + 8 * 4 * weight.numel()
    operations = 4 * tokens * (above + weight.numel())
    return max(moved / bandwidth(weight), operations / rate(weight))


def bandwidth(like: Tensor, now: Callable[[], float] = _now, repeats: int = 5) -> float:
    """Bytes a second, by a clock, that an elementwise operation on large tensors reads and writes."""
    a = torch.ones(2**27 // 4, device=like.device)
    b = torch.empty_like(a)
    seconds = min(_seconds(lambda: torch.add(a, 1, out=b), now=now) for _ in range(repeats))
    return 2 * a.nbytes / seconds


def rate(like: Tensor, now: Callable[[], float] = _now, repeats: int = 5) -> float:
    """Operations a second, by a clock, of a large matrix product in the model's dtype, by the fastest library."""
    n = 256 if like.device.type == "cpu" and like.dtype != torch.float32 else 2048  # which many processors emulate
    a = torch.ones(n, n, device=like.device, dtype=like.dtype)
    linear = torch.nn.Linear(n, n, bias=False, device=like.device, dtype=like.dtype)
    with torch.no_grad(), linear_by_onednn(linear):
        products = (lambda: torch.mm(a, a), lambda: linear(a))
        seconds = min(_seconds(product, now=now) for _ in range(repeats) for product in products)
    return 2 * n**3 / seconds


def hyper_params(model: PreTrainedModel, layer: int, steps: int, device: str) -> KDPOHyperParams:
    """The paper's hyper-parameters for a model."""
    hparams = KDPOHyperParams(alg_name="KDPO", model_name=(model, None), device=device, layers=[layer], num_steps=steps)
    return hparams.for_model(model)


def load(shape: str, path: str | None, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, int]:
    """A model with random weights (or the one at ``path``), and the layer of it that is edited."""
    if path:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
        model.to(torch.device(device))  # type: ignore[arg-type]
        return model, round(model.config.num_hidden_layers * 2 / 3)
    torch.manual_seed(0)
    config = deepcopy(SHAPES[shape].config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, SHAPES[shape].layer
