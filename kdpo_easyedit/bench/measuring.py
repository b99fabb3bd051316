"""What is measured of an edit: EasyEdit's metrics, and what the model writes on its own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..easyedit import host
from ..easyedit.main import decide_at
from ..easyedit.measuring import edit_quality
from ..method.asking import context_of
from ..method.preference import context_length, edit_tokens, has_room, teacher_forced_negatives
from .answers import answers, exact
from .batches import Batching
from .datasets import DatasetError, Request
from .metrics import harmonic_score, probe, rephrasings, with_locality
from .metrics import measure as measure_in_batches
from .schema import FOUR, MEASURES, EditMetrics, Metrics, Summary, batch_size
from .significance import joint_interval, mean_interval, share_interval
from .writing import write_answers


@dataclass(frozen=True)
class Measuring:
    """How a run measures: the same for all of its methods, and part of what the run is.

    Attributes:
        engine: ``"batched"``, this package's, or ``"easyedit"``, the host's own code, one prompt at a time: the same
            figures but for fluency (see :mod:`.metrics`).
        contexts: how written answers are asked for (:mod:`..method.asking`); the first one's are those of the tables. Without
            any, nothing is written.
        fluency: whether texts are written for it, which takes longer than all else.
        probes: whether negation and contradiction are probed.
    """

    engine: str = "batched"
    contexts: tuple[str, ...] = ("plain",)
    fluency: bool = True
    probes: bool = False


def measure(
    editor: Any,
    model: Any,
    requests: Sequence[Request],
    seed: int,
    how: Measuring = Measuring(),
    rows_are: Callable[[Sequence[int]], None] | None = None,
    costs: dict[str, float] | None = None,
) -> list[Metrics]:
    """EasyEdit's metrics of every request; beside them, what the model writes on its own, and whether that is the target.

    Args:
        rows_are: where every request is measured on an edit of its own, see :class:`.batches.Batching`.
        costs: where to add the ``tokens`` of written answers, and the seconds of ``writing`` them.

    Returns:
        For each request what :func:`.metrics.measure` gives, and ``generated``: of ``rewrite`` and ``rephrase`` the texts, one
        a prompt, whether each begins with the target (``…_acc``), is the target (``…_exact``) and ended by itself
        (``…_stopped``), with the ``tokens`` that they took in all; for other contexts than the first, the same under
        ``generated_CONTEXT``; with probes, ``probes`` as :func:`.metrics.probe` gives them.
    """
    tok = editor.tok
    batching = replace(batching_for(model), rows_are=rows_are)
    if how.engine == "easyedit":
        measured = []
        for request in requests:
            seed_everything(seed)  # so that what fluency samples does not hang on what was measured before
            measured.append(by_easyedit(editor, model, request, how.fluency))
    else:
        measured = measure_in_batches(model, tok, requests, how.fluency, old_answers=True, seed=seed, batching=batching)
    asked = [
        (number, kind, prompt)
        for number, request in enumerate(requests)
        for kind, prompts in (("rewrite", [request["prompt"]]), ("rephrase", rephrasings(request)))
        for prompt in prompts
    ]
    targets = [requests[number]["target_new"] for number, _, _ in asked]
    for context in how.contexts:
        key = "generated" if context == how.contexts[0] else f"generated_{context}"
        prompts, owners = [prompt for _, _, prompt in asked], [number for number, _, _ in asked]
        written = write_answers(model, tok, prompts, targets, context, batching=batching.of(owners))
        for (number, kind, _), answer, target in zip(asked, written, targets):
            texts = measured[number].setdefault(key, {})
            for name, value in (
                (kind, answer.text),
                (f"{kind}_acc", float(answers(answer.text, target))),
                (f"{kind}_exact", float(exact(answer.text, target))),
                (f"{kind}_stopped", float(answer.stopped)),
            ):
                texts.setdefault(name, []).append(value)
            texts["tokens"] = texts.get("tokens", 0) + answer.tokens
        if costs is not None:
            costs["tokens"] = costs.get("tokens", 0) + sum(answer.tokens for answer in written)
            costs["writing"] = costs.get("writing", 0) + sum(answer.seconds for answer in written)
    if how.probes:
        for quality, found in zip(measured, probe(model, tok, requests, batching)):
            quality["probes"] = found
    return measured


def by_easyedit(editor: Any, model: Any, request: Request, fluency: bool = True) -> Metrics:
    """The metrics of a request by the host's own code; of a list of rephrasings, in which it would read letters, each."""
    prompts = rephrasings(request)
    quality = edit_quality(editor, model, {**request, "rephrase_prompt": prompts[0]} if prompts else request, fluency)
    for prompt in prompts[1:]:
        alone = {**request, "rephrase_prompt": prompt, "locality": {}, "portability": {}}
        quality["rephrase_acc"] += edit_quality(editor, model, alone, fluency=False)["rephrase_acc"]
    return quality


def measure_after(
    editor: Any,
    model: Any,
    entries: Sequence[EditMetrics],
    seed: int,
    how: Measuring = Measuring(),
    rows_are: Callable[[Sequence[int]], None] | None = None,
    costs: dict[str, float] | None = None,
) -> list[Metrics]:
    """:func:`measure` of an edited model, with locality: the share of tokens that it says as it did before the edit."""
    measured = measure(editor, model, [entry.requested_rewrite for entry in entries], seed, how, rows_are, costs)
    return [with_locality(entry.pre, post) for entry, post in zip(entries, measured)]


def batching_for(model: Any) -> Batching:
    """How a model is run: one that a method has wrapped decides for each prompt by itself whether an edit is asked for."""
    return Batching(one_by_one=True, decide_at=decide_at) if host.is_wrapper(model) else Batching()


def per_edit(metrics: Sequence[EditMetrics], phase: str) -> dict[str, list[float | None]]:
    """A :class:`Summary`'s measures of every edit, each the mean over the edit's prompts; None where it has none."""

    def mean(value: Any, scale: float = 100.0) -> float | None:
        return float(np.mean(value)) * scale if np.size(value) else None

    def section(entry: EditMetrics, name: str) -> list[float]:
        return [score for key, scores in getattr(entry, phase)[name].items() if key.endswith("_acc") for score in scores]

    def written(key: str) -> list[float | None]:
        return [mean(_known(getattr(entry, phase).get("generated", {}).get(key, []))) for entry in metrics]

    return {
        "edit_success": [mean(getattr(entry, phase)["rewrite_acc"]) for entry in metrics],
        "generalization": [mean(getattr(entry, phase).get("rephrase_acc", [])) for entry in metrics],
        "locality": [mean(section(entry, "locality")) for entry in metrics],
        "portability": [mean(section(entry, "portability")) for entry in metrics],
        "fluency": [mean(getattr(entry, phase).get("fluency", {}).get("ngram_entropy", []), scale=1) for entry in metrics],
        "generated_success": written("rewrite_acc"),
        "generated_generalization": written("rephrase_acc"),
        "exact_success": written("rewrite_exact"),
        "exact_generalization": written("rephrase_exact"),
        "judged_success": written("rewrite_judged"),
        "judged_generalization": written("rephrase_judged"),
        **{
            name: [mean(getattr(entry, phase).get("probabilities", {}).get(kind, {}).get("scores", [])) for entry in metrics]
            for name, kind in (("es", "success"), ("ps", "paraphrase"), ("ns", "neighborhood"))
        },
        "seconds_per_edit": [entry.time if phase == "post" else None for entry in metrics],
        "megabytes_per_edit": [
            entry.memory / 1e6 if phase == "post" and entry.memory is not None else None for entry in metrics
        ],
    }


def further_per_edit(metrics: Sequence[EditMetrics], phase: str) -> dict[str, list[float | None]]:
    """The measures of every edit that stand under ``further`` in a :class:`Summary`, but for those of whole models."""
    phases = [getattr(entry, phase) for entry in metrics]

    def mean(scores: Any) -> float | None:
        finite = [score for score in np.ravel(_known(scores)) if math.isfinite(score)]  # an overflow's are no numbers
        return 100 * float(np.mean(finite)) if finite else None

    found: dict[str, list[float | None]] = {}
    for key in dict.fromkeys(key for of in phases for key in of if key.startswith("generated")):
        context = key.removeprefix("generated")
        texts = [of.get(key, {}) for of in phases]
        stopped = [text.get("rewrite_stopped", []) + text.get("rephrase_stopped", []) for text in texts]
        found[f"unstopped{context}"] = [mean([1 - one for one in of]) for of in stopped]
        if context:
            for name, kind in _WRITTEN.items():
                found[f"{name}{context}"] = [mean(text.get(kind, [])) for text in texts]
    for name, kind in (("em", "success"), ("pm", "paraphrase"), ("nm", "neighborhood")):
        found[name] = [mean(of.get("probabilities", {}).get(kind, {}).get("magnitudes", [])) for of in phases]
    for name in ("negation", "contradiction"):
        found[name] = [mean(of.get("probes", {}).get(name, [])) for of in phases]
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


# The measures of written answers, and their names in the metrics.
_WRITTEN = {
    "generated_success": "rewrite_acc",
    "exact_success": "rewrite_exact",
    "generated_generalization": "rephrase_acc",
    "exact_generalization": "rephrase_exact",
}


def _known(scores: Any) -> Any:
    """Scores without those that are not known; in version 1 there is one, and no list."""
    return [score for score in scores if score is not None] if isinstance(scores, list) else scores


def summarise(method: str, protocol: str, metrics: Sequence[EditMetrics], phase: str) -> Summary:
    """The means of a run's metrics over its edits, with intervals; of the memory, the median.

    Args:
        metrics: EasyEdit's, one entry an edit.
        phase: ``"pre"`` or ``"post"``.
    """
    by_edit = per_edit(metrics, phase)
    values = {key: [v for v in found if v is not None] for key, found in by_edit.items()}
    # What a first edit loads once, and keeps, is no part of what an edit takes.
    centre = {key: np.median if key == "megabytes_per_edit" else np.mean for key in values}
    means = {key: round(float(centre[key](found)), 4) if found else None for key, found in values.items()}
    intervals = {
        key: (mean_interval if key == "fluency" else share_interval)(values[key]) for key in MEASURES if len(values[key]) > 1
    }
    # The unedited model has no locality: a mean of the rest is no figure to hold a method's against.
    if phase == "post" and (means_of_four := [value for key in FOUR if (value := means[key]) is not None]):
        means["mean"] = round(float(sum(means_of_four) / len(means_of_four)), 4)
        if len(metrics) > 1:
            intervals["mean"] = joint_interval([by_edit[key] for key in FOUR])
    shares = [by_edit[key] for key in ("es", "ps", "ns") if means[key] is not None]
    by_edit_further = further_per_edit(metrics, phase)
    further = {}
    for key, of_edits in by_edit_further.items():
        known = [value for value in of_edits if value is not None]
        further[key] = round(float(np.mean(known)), 4)
        if len(known) > 1:
            intervals[key] = (mean_interval if key in ("em", "pm", "nm") else share_interval)(known)
    if shares:
        further["score"] = round(harmonic_score([means[key] for key in ("es", "ps", "ns") if means[key] is not None]), 4)  # type: ignore[misc]
        if len(metrics) > 1:
            intervals["score"] = joint_interval(shares, harmonic_score)
    if phase == "post":
        for key, centre_of in (("seconds_per_edit", np.mean), ("megabytes_per_edit", np.median)):
            of_batches = values[key][:: batch_size(protocol)]  # whose edits share what was measured once
            if len(of_batches) > 1:
                intervals[key] = mean_interval(of_batches, centre=centre_of)
    once = [entry.once for entry in metrics if entry.once is not None] if phase == "post" else []
    means["once_seconds"] = round(sum(once), 4) if once else None
    failed = sum(entry.error is not None for entry in metrics) if phase == "post" else 0
    return Summary(
        method=method, protocol=protocol, n_edits=len(metrics), intervals=intervals, failed=failed, further=further, **means
    )


def retention(metrics: Sequence[EditMetrics], parts: int = 10) -> list[list[float]]:
    """Edit success in percent by age, measured when all edits of a sequence were made: of each tenth, oldest first, the mean,
    and where the tenth has several edits the ends of its 95 % confidence interval.

    Empty where there are fewer edits than parts.
    """
    success = [100 * float(np.mean(entry.post["rewrite_acc"])) for entry in metrics]
    tenths = np.array_split(success, parts) if len(success) >= parts else []
    return [[round(float(np.mean(of)), 2), *(share_interval(of.tolist()) if len(of) > 1 else ())] for of in tenths]


def token_accuracy(model: Any, tok: Any, request: Request) -> float:
    """The share of the target's tokens that the model says under teacher forcing."""
    logits, targets = _target_logits(model, tok, request)
    return (teacher_forced_negatives(logits) == targets).sum().item() / len(targets)


def target_probability(model: Any, tok: Any, request: Request) -> float:
    """How likely the model is to say the whole target: the product of its tokens' probabilities under teacher forcing.

    The prompt is put as the request's ``context`` says (:mod:`kdpo_easyedit.method.asking`).
    """
    logits, targets = _target_logits(model, tok, request)
    log_probs = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1))
    return math.exp(sum(log_probs.flatten().tolist()))


def _target_logits(model: Any, tok: Any, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits ``[T, V]`` of the positions that predict the target's tokens, and those tokens, int64 ``[T]``."""
    tokens = edit_tokens(tok, request["prompt"], request["target_new"], model.device, context_of(request))
    with torch.no_grad():
        return model(input_ids=tokens.input_ids).logits[0, tokens.prompt_length - 1 : -1], tokens.targets


def check_length(what: str, text: str, model: Any, tok: Any) -> None:
    """Whether a model has room for a text.

    Raises:
        DatasetError: it has not; the message begins with ``what``.
    """
    length = len(tok(text)["input_ids"])
    if not has_room(model, length):
        raise DatasetError(f"{what} have {length} tokens, and the model takes {context_length(model)}")


def seed_everything(seed: int) -> None:
    seed %= 2**32  # all that NumPy takes
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
