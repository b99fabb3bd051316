"""What measuring costs: EasyEdit's ``compute_edit_quality`` against :func:`kdpo_easyedit.bench.metrics.measure`, in one run.

``kdpo benchmark --metrics --model MODEL --data FILE`` measures the same edits on the unedited model with both,
in turn, and prints seconds an edit, how many times faster the engine is, and how many teacher-forced figures are equal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..easyedit.loading import ModelName
from ..easyedit.measuring import edit_quality
from .benchmark import llama
from .datasets import Request, load_requests
from .metrics import Metrics, measure


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


def benchmark_metrics(
    folder: str | Path, data: str | Path, size: int = 50, fluency: bool = True, device: str = "cpu", shape_1b: bool = False
) -> MetricsBenchmark:
    """Measure the first edits of a file with both.

    Args:
        folder: the model's, or its name.
        data: a benchmark file of edits.
        size: how many edits of it.
        fluency: measure it too, which takes EasyEdit's code most of its time.
        device: the model's.
        shape_1b: instead of the model's weights, random ones in the shape of Llama-3.2-1B; the tokenizer is the model's.
    """
    requests = load_requests(data, size=size)
    tok = AutoTokenizer.from_pretrained(folder)
    model: Any = _random_1b(len(tok)) if shape_1b else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(torch.device(device)).eval()
    tok.pad_token, tok.padding_side = tok.pad_token or tok.eos_token, "left"
    settings = SimpleNamespace(alg_name="KDPO", max_length=40, device=device)
    editor = SimpleNamespace(hparams=settings, tok=tok, model_name=ModelName(str(folder), model.config.model_type))

    def theirs(fluency: bool) -> list[Metrics]:
        return [edit_quality(editor, model, request, fluency) for request in requests]

    def ours(fluency: bool) -> list[Metrics]:
        return measure(model, tok, requests, fluency)

    measure(model, tok, requests[:1], fluency=False)  # what is loaded at the first use is no part of it
    edit_quality(editor, model, requests[0], fluency=False)
    (engine, mine), (easyedit, others) = _timed(ours, False), _timed(theirs, False)
    compared = [pair for request, a, b in zip(requests, mine, others) for pair in _figures(request, a, b)]
    forced, everything, means = Cost(easyedit / size, engine / size), None, None
    if fluency:
        (engine, mine), (easyedit, others) = _timed(ours, True), _timed(theirs, True)
        everything = Cost(easyedit / size, engine / size)
        of_texts = [sum(entry["fluency"]["ngram_entropy"] for entry in found) / size for found in (others, mine)]
        means = of_texts[0], of_texts[1]
    differing = [prompt for prompt, a, b in compared if a != b]
    return MetricsBenchmark(len(requests), forced, everything, len(compared), differing, means)


def _random_1b(vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = llama(2048, 8192, 16, 32, vocabulary, num_key_value_heads=8, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config)


def _timed(function: Callable[[bool], list[Metrics]], fluency: bool) -> tuple[float, list[Metrics]]:
    started = time.perf_counter()  # both give numbers in Python: nothing is left to do on the device
    found = function(fluency)
    return time.perf_counter() - started, found


def _figures(request: Request, mine: Metrics, other: Metrics) -> list[tuple[str, Any, Any]]:
    """Every prompt with its figure by the engine and by EasyEdit's code."""
    asked = [(request["prompt"], mine["rewrite_acc"][0], other["rewrite_acc"][0])]
    if "rephrase_prompt" in request:
        asked.append((request["rephrase_prompt"], mine["rephrase_acc"][0], other["rephrase_acc"][0]))
    for section, suffix in (("locality", "output"), ("portability", "acc")):
        for kind, questions in request[section].items():
            name = f"{kind}_{suffix}"
            asked += zip(questions["prompt"], mine[section][name], other[section][name])
    return asked
