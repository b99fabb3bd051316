"""What measuring costs: EasyEdit's ``compute_edit_quality`` against :func:`kdpo_easyedit.bench.metrics.measure`, in one run.

``kdpo benchmark --metrics --model MODEL --data FILE`` measures the same edits on the unedited model with both,
in turn, and prints seconds an edit, how many times faster the engine is, and how many teacher-forced figures are equal.
With ``--shape`` in place of a model the weights are random and nothing has to be fetched.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ..easyedit.loading import ModelName
from .datasets import Request
from .measuring import by_easyedit
from .metrics import Metrics, measure, rephrasings


@dataclass(frozen=True)
class Cost:
    """Seconds an edit by EasyEdit's code and by the engine."""

    easyedit: float
    engine: float

    @property
    def ratio(self) -> float:
        """How many times faster the engine is."""
        return self.easyedit / self.engine


@dataclass(frozen=True)
class MetricsBenchmark:
    """What :func:`benchmark_metrics` found.

    Attributes:
        edits: how many were measured.
        forced: the cost of rewrite, rephrase, locality and portability.
        everything: that of all metrics, fluency among them; None where it was left out.
        figures: how many teacher-forced figures there are: one a prompt.
        differing: the prompts of which the figure is another one with the engine.
        fluency: the mean fluency by EasyEdit's code and by the engine, in bits; they are of different texts.
    """

    edits: int
    forced: Cost
    everything: Cost | None
    figures: int
    differing: list[str]
    fluency: tuple[float, float] | None


def benchmark_metrics(model: Any, tok: Any, requests: Sequence[Request], fluency: bool = True) -> MetricsBenchmark:
    """Measure edits with both, on a model as it is.

    Args:
        model: a causal language model, on its device.
        tok: its tokenizer; set to pad on the left, as EasyEdit sets it.
        requests: the edits.
        fluency: measure it too, which takes EasyEdit's code most of its time.
    """
    model.eval()
    tok.pad_token, tok.padding_side = tok.pad_token or tok.eos_token, "left"
    settings = SimpleNamespace(alg_name="KDPO", max_length=40, device=str(model.device))
    editor = SimpleNamespace(hparams=settings, tok=tok, model_name=ModelName("model", model.config.model_type))

    def theirs(requests: Sequence[Request], fluency: bool) -> list[Metrics]:
        return [by_easyedit(editor, model, request, fluency=fluency) for request in requests]

    def ours(requests: Sequence[Request], fluency: bool) -> list[Metrics]:
        return measure(model, tok, requests, fluency)

    def timed(measured: Callable[[Sequence[Request], bool], list[Metrics]], fluency: bool) -> tuple[float, list[Metrics]]:
        measured(requests[:1], fluency)  # what is loaded or compiled at the first use is no part of it
        started = time.perf_counter()  # both give numbers in Python: nothing is left to do on the device
        found = measured(requests, fluency)
        return (time.perf_counter() - started) / len(requests), found

    (engine, mine), (easyedit, others) = timed(ours, False), timed(theirs, False)
    compared = [pair for request, a, b in zip(requests, mine, others) for pair in _figures(request, a, b)]
    forced, everything, means = Cost(easyedit, engine), None, None
    if fluency:
        (engine, mine), (easyedit, others) = timed(ours, True), timed(theirs, True)
        everything = Cost(easyedit, engine)
        of_texts = [sum(entry["fluency"]["ngram_entropy"] for entry in found) / len(found) for found in (others, mine)]
        means = of_texts[0], of_texts[1]
    differing = [prompt for prompt, a, b in compared if a != b]
    return MetricsBenchmark(len(requests), forced, everything, len(compared), differing, means)


def whole_words(requests: Sequence[Request], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for random weights: a token a word of the edits, made-up words up to ``size``, and a token to begin with."""
    split = BertPreTokenizer()
    found = {word for request in requests for word, _ in split.pre_tokenize_str(json.dumps(request, ensure_ascii=False))}
    words = ["<s>", "</s>", "<unk>", *sorted(found)]
    words += (f"word{number}" for number in range(len(words), size))
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words[:size])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _figures(request: Request, mine: Metrics, other: Metrics) -> list[tuple[str, Any, Any]]:
    """Every prompt with its figure by the engine and by EasyEdit's code."""
    asked = [(request["prompt"], mine["rewrite_acc"][0], other["rewrite_acc"][0])]
    if prompts := rephrasings(request):
        asked += zip(prompts, mine["rephrase_acc"], other["rephrase_acc"])
    for section, suffix in (("locality", "output"), ("portability", "acc")):
        for kind, questions in request[section].items():
            name = f"{kind}_{suffix}"
            asked += zip(questions["prompt"], mine[section][name], other[section][name])
    return asked
