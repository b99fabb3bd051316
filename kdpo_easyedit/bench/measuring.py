"""What is measured of an edit: EasyEdit's metrics, and what the model writes on its own."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..easyedit.measuring import edit_quality
from ..method.preference import edit_tokens, teacher_forced_negatives
from .datasets import DatasetError, Request
from .schema import MEASURES, EditMetrics, Metrics, Summary
from .significance import mean_interval, share_interval


def measure(editor: Any, model: Any, request: Request, seed: int) -> Metrics:
    """EasyEdit's metrics; beside them, what the model writes on its own, and whether that answers with the target."""
    seed_everything(seed)  # so that what fluency samples does not hang on what was measured before
    metrics = edit_quality(editor, model, request)
    metrics["generated"] = {}
    for key, prompt in (("rewrite", request["prompt"]), ("rephrase", request.get("rephrase_prompt"))):
        if prompt:
            text = continuation(model, editor.tok, prompt, request["target_new"])
            metrics["generated"] |= {key: text, f"{key}_acc": float(answers(text, request["target_new"]))}
    return metrics


def measure_after(editor: Any, model: Any, entry: EditMetrics, seed: int) -> Metrics:
    """EasyEdit's metrics of an edited model, with locality: the share of tokens that it says as it did before the edit."""
    post = measure(editor, model, entry.requested_rewrite, seed)
    before, after = entry.pre["locality"], post["locality"]
    for kind in entry.requested_rewrite["locality"]:
        pairs = zip(before[f"{kind}_output"], after[f"{kind}_output"], strict=True)
        after[f"{kind}_acc"] = [float(np.mean(np.equal(old, new))) for old, new in pairs]
    return post


def per_edit(metrics: Sequence[EditMetrics], phase: str) -> dict[str, list[float | None]]:
    """A :class:`Summary`'s measures of every edit, each the mean over the edit's prompts; None where it has none."""

    def mean(value: Any, scale: float = 100.0) -> float | None:
        return float(np.mean(value)) * scale if np.size(value) else None

    def section(entry: EditMetrics, name: str) -> list[float]:
        return [score for key, scores in getattr(entry, phase)[name].items() if key.endswith("_acc") for score in scores]

    return {
        "edit_success": [mean(getattr(entry, phase)["rewrite_acc"]) for entry in metrics],
        "generalization": [mean(getattr(entry, phase).get("rephrase_acc", [])) for entry in metrics],
        "locality": [mean(section(entry, "locality")) for entry in metrics],
        "portability": [mean(section(entry, "portability")) for entry in metrics],
        "fluency": [mean(getattr(entry, phase)["fluency"]["ngram_entropy"], scale=1) for entry in metrics],
        "generated_success": [mean(getattr(entry, phase)["generated"]["rewrite_acc"]) for entry in metrics],
        "generated_generalization": [mean(getattr(entry, phase)["generated"].get("rephrase_acc", [])) for entry in metrics],
        "seconds_per_edit": [entry.time if phase == "post" else None for entry in metrics],
        "megabytes_per_edit": [
            entry.memory / 1e6 if phase == "post" and entry.memory is not None else None for entry in metrics
        ],
    }


def summarise(method: str, protocol: str, metrics: Sequence[EditMetrics], phase: str) -> Summary:
    """The means of a run's metrics over its edits, with intervals; of the memory, the median.

    Args:
        metrics: EasyEdit's, one entry an edit.
        phase: ``"pre"`` or ``"post"``.
    """
    values = {key: [v for v in found if v is not None] for key, found in per_edit(metrics, phase).items()}
    # What a first edit loads once, and keeps, is no part of what an edit takes.
    centre = {key: np.median if key == "megabytes_per_edit" else np.mean for key in values}
    means = {key: round(float(centre[key](found)), 4) if found else None for key, found in values.items()}
    intervals = {
        key: (mean_interval if key == "fluency" else share_interval)(values[key]) for key in MEASURES if len(values[key]) > 1
    }
    failed = sum(entry.error is not None for entry in metrics) if phase == "post" else 0
    return Summary(method=method, protocol=protocol, n_edits=len(metrics), intervals=intervals, failed=failed, **means)


def retention(metrics: Sequence[EditMetrics], parts: int = 10) -> list[float]:
    """Edit success in percent by age, measured when all edits of a sequence were made: the mean of each tenth, oldest first.

    Empty where there are fewer edits than parts.
    """
    success = [np.mean(entry.post["rewrite_acc"]) for entry in metrics]
    return [round(100 * float(np.mean(part)), 2) for part in np.array_split(success, parts)] if len(success) >= parts else []


def token_accuracy(model: Any, tok: Any, request: Request) -> float:
    """The share of the target's tokens that the model says under teacher forcing."""
    logits, targets = _target_logits(model, tok, request)
    return (teacher_forced_negatives(logits) == targets).double().mean().item()


def target_probability(model: Any, tok: Any, request: Request) -> float:
    """How likely the model is to say the whole target: the product of its tokens' probabilities under teacher forcing."""
    logits, targets = _target_logits(model, tok, request)
    log_probs = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1))
    return math.exp(sum(log_probs.flatten().tolist()))


def _target_logits(model: Any, tok: Any, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits ``[T, V]`` of the positions that predict the target's tokens, and those tokens, int64 ``[T]``."""
    tokens = edit_tokens(tok, request["prompt"], request["target_new"], model.device)
    with torch.no_grad():
        return model(input_ids=tokens.input_ids).logits[0, tokens.prompt_length - 1 : -1], tokens.targets


def continuation(model: Any, tok: Any, prompt: str, target: str) -> str:
    """What the model writes after a prompt, greedily, to the end of the line, with a little more room than the target needs."""
    inputs = tok(prompt, return_tensors="pt").to(model.device)
    room = len(tok(f" {target}")["input_ids"]) + 8
    if limit := getattr(model.config, "max_position_embeddings", None):
        room = max(1, min(room, limit - inputs["input_ids"].shape[1]))
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=room, do_sample=False, pad_token_id=tok.pad_token_id)
    text = tok.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return text.partition("\n")[0]


def answers(text: str, target: str) -> bool:
    """Whether a text begins with the target: the same words, whatever their case and the punctuation between them."""
    said, wanted = (re.findall(r"\w+", words.casefold()) for words in (text, target))
    return said[: len(wanted)] == wanted if wanted else text.startswith(target.strip())


def check_length(what: str, text: str, model: Any, tok: Any) -> None:
    """Whether a model has room for a text.

    Raises:
        DatasetError: it has not; the message begins with ``what``.
    """
    room, length = getattr(model.config, "max_position_embeddings", None), len(tok(text)["input_ids"])
    if room and length > room:
        raise DatasetError(f"{what} have {length} tokens, and the model takes {room}")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
