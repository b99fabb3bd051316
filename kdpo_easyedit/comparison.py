"""Methods × requests → EasyEdit's metrics, after single edits or after all of a sequence.

Every method is EasyEdit's own, through ``BaseEditor``, on the same model, and is measured by EasyEdit's own metrics. The
model before any edit is measured once, for all.
"""

from __future__ import annotations

import copy
import json
import random
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from . import host
from .datasets import Request

SINGLE, SEQUENTIAL = "single", "sequential"
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method under the name that the comparison shows, with EasyEdit's hyper-parameters for it."""

    name: str
    hparams: Any


@dataclass(frozen=True)
class Summary:
    """A row of a comparison: means over the edits, each of the mean over its prompts, in percent.

    Attributes:
        fluency: n-gram entropy of what the model writes, in bits, as EasyEdit measures it.
        seconds_per_edit: wall-clock time of the edits alone.
    """

    method: str
    protocol: str
    n_edits: int
    edit_success: float | None
    generalization: float | None
    locality: float | None
    portability: float | None
    fluency: float | None
    seconds_per_edit: float | None


@dataclass(frozen=True)
class Example:
    """One edit in words."""

    prompt: str
    target: str
    before: str
    after: str


@dataclass
class Comparison:
    """What :func:`compare` found.

    Attributes:
        before: the model before any edit.
        rows: one for every method and protocol.
        examples: some of the first method's single edits.
    """

    before: Summary
    rows: list[Summary]
    examples: list[Example]


def compare(
    methods: Sequence[Method],
    requests: Sequence[Request],
    protocols: Sequence[str],
    folder: Path,
    seed: int = 0,
    n_examples: int = 3,
) -> Comparison:
    """Run every method under every protocol, and write what comes out into ``folder`` as it comes.

    Written are ``metrics-METHOD-PROTOCOL.json`` in EasyEdit's format, ``summary.json``, and EasyEdit's own output in
    ``logs/``. Under ``"single"`` the model is restored after each edit. Under ``"sequential"`` every edit starts from what
    the last one left, and all are measured once, on the final model, as the paper does.

    Args:
        methods: all on the same model.
        requests: the edits, as :func:`kdpo_easyedit.datasets.load_requests` gives them.
        protocols: ``"single"``, ``"sequential"`` or both.
        folder: where to write; made if need be.
        seed: of all sampling: fluency's, and the contexts that ROME and MEMIT write.
        n_examples: how many of the first method's single edits are told in words.

    Raises:
        HostError: methods of different models, or a model or device that cannot be had.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = [_settings(method.hparams) for method in methods]
    if any(other != settings[0] for other in settings):
        raise host.HostError(f"the methods are set to edit different models: {settings}; compare methods on one model")
    methods = [Method(method.name, host.in_place(method.hparams)) for method in methods]

    with host.output_to(folder):
        host.forget_contexts()
        first = host.BaseEditor(copy.copy(methods[0].hparams))
        before: list[Metrics] = [
            {"case_id": number, "requested_rewrite": request, "pre": _measure(first, first.model, request, seed)}
            for number, request in enumerate(_progress(requests, "before editing"))
        ]
        result = Comparison(summarise("(before)", "", before, "pre"), [], [])
        for protocol in protocols:
            for method in methods:
                editor = _editor(method, first, protocol)
                metrics = copy.deepcopy(before)
                _seed_everything(seed)
                if protocol == SINGLE:
                    examples = _edit_one_by_one(editor, metrics, method.name, seed, n_examples)
                    result.examples = result.examples or examples
                else:
                    _edit_in_sequence(editor, metrics, method.name, seed)
                write_json(folder / f"metrics-{method.name}-{protocol}.json", metrics)
                result.rows.append(summarise(method.name, protocol, metrics, "post"))
                write_json(folder / "summary.json", [asdict(row) for row in result.rows])
    return result


def _edit_one_by_one(editor: Any, metrics: list[Metrics], name: str, seed: int, n_examples: int) -> list[Example]:
    """Fill in ``metrics`` for single edits; the first few are told in words."""
    examples: list[Example] = []
    for entry in _progress(metrics, f"{name}, single edits"):
        request = entry["requested_rewrite"]
        told = len(examples) < n_examples
        said = say(editor.model, editor.tok, request["prompt"]) if told else ""
        edited, originals = _timed_edit(editor, entry)
        try:
            entry["post"] = _measure(editor, edited, request, seed)
            _compare_locality(entry)
            if told:
                now = say(edited, editor.tok, request["prompt"])
                examples.append(Example(request["prompt"], request["target_new"], said, now))
        finally:
            host.undo_edits(editor, edited, originals)
    return examples


def _edit_in_sequence(editor: Any, metrics: list[Metrics], name: str, seed: int) -> None:
    """Fill in ``metrics`` for edits made one after another and measured at the end."""
    first_edited: Any = None
    originals: dict[str, torch.Tensor] = {}
    try:
        for entry in _progress(metrics, f"{name}, sequential edits"):
            edited, changed = _timed_edit(editor, entry)
            first_edited = first_edited or edited
            originals = changed | originals
        for entry in _progress(metrics, f"{name}, metrics after all edits"):
            entry["post"] = _measure(editor, edited, entry["requested_rewrite"], seed)
            _compare_locality(entry)
    finally:
        if first_edited is not None:
            host.undo_edits(editor, first_edited, originals)


def _timed_edit(editor: Any, entry: Metrics) -> tuple[Any, dict[str, torch.Tensor]]:
    started = time.perf_counter()
    edited, originals = host.apply_edit(editor, entry["requested_rewrite"])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    entry["time"] = time.perf_counter() - started
    return edited, originals


def _measure(editor: Any, model: Any, request: Request, seed: int) -> Metrics:
    _seed_everything(seed)  # so that what fluency samples does not hang on what was measured before
    return host.edit_quality(editor, model, request)


def _compare_locality(entry: Metrics) -> None:
    """Locality: the share of tokens that the model predicts as it did before the edit, for every prompt of every kind."""
    before, after = entry["pre"]["locality"], entry["post"]["locality"]
    for kind in entry["requested_rewrite"]["locality"]:
        pairs = zip(before[f"{kind}_output"], after[f"{kind}_output"], strict=True)
        after[f"{kind}_acc"] = [float(np.mean(np.equal(old, new))) for old, new in pairs]


def summarise(method: str, protocol: str, metrics: Sequence[Metrics], phase: str) -> Summary:
    """The means of a run's metrics.

    Args:
        metrics: EasyEdit's, one entry an edit.
        phase: ``"pre"`` or ``"post"``.
    """

    def mean(values: Iterable[Any], scale: float = 100.0) -> float | None:
        found = [np.mean(value) for value in values if np.size(value)]
        return round(float(np.mean(found)) * scale, 4) if found else None

    def section(entry: Metrics, name: str) -> list[float]:
        kinds = [value for key, value in entry[phase][name].items() if key.endswith("_acc")]
        return [score for kind in kinds for score in kind]

    return Summary(
        method=method,
        protocol=protocol,
        n_edits=len(metrics),
        edit_success=mean(entry[phase]["rewrite_acc"] for entry in metrics),
        generalization=mean(entry[phase].get("rephrase_acc", []) for entry in metrics),
        locality=mean(section(entry, "locality") for entry in metrics),
        portability=mean(section(entry, "portability") for entry in metrics),
        fluency=mean((entry[phase]["fluency"]["ngram_entropy"] for entry in metrics), scale=1),
        seconds_per_edit=mean((entry.get("time", []) for entry in metrics), scale=1),
    )


def say(model: Any, tok: Any, prompt: str, max_new_tokens: int = 16) -> str:
    """What the model writes after a prompt, greedily, up to the end of its first sentence."""
    inputs = tok(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tok.pad_token_id)
    text = tok.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return re.split(r"(?<=[.!?])\s|\n", text, maxsplit=1)[0]


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    unfinished.replace(path)


def _settings(hparams: Any) -> tuple[Any, ...]:
    """What decides how a model is loaded."""
    return tuple(getattr(hparams, key, False) for key in ("model_name", "device", "fp16", "model_parallel"))


def _editor(method: Method, loaded: Any, protocol: str) -> Any:
    """EasyEdit's editor of a method, on the model that another editor has loaded."""
    hparams = copy.copy(method.hparams)
    hparams.model_name = (loaded.model, loaded.tok)
    if hasattr(hparams, "sequential_edit"):
        hparams.sequential_edit = protocol == SEQUENTIAL
    return host.BaseEditor(hparams)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _progress(items: Sequence[Any], description: str) -> tqdm:
    return tqdm(items, desc=description, unit="edit", file=sys.__stderr__)
