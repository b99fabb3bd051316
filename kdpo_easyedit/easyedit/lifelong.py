"""Methods of main's whose own executors keep the first model that they see and what they learn of edits: run for any model,
with what they learn where it can be saved, taken back and forgotten.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import make_dataclass
from functools import cache
from typing import Any
from weakref import ref

import torch
from transformers.pytorch_utils import Conv1D

from ..method.preference import edit_tokens
from ..method.weights import checksum, read, write
from .host import ALG_DICT, HostError, submodule

#: By method, the tensors that it has learnt of its edits. Replaced whole after an edit, and never changed in place.
learnt: dict[str, dict[str, torch.Tensor]] = {}
#: By method, what its last edit has left: the model, and the state of each weight that it edits. What it remembers is of this.
left: dict[str, tuple[ref[Any], dict[str, int]]] = {}


def forget() -> None:
    """Let no method remember an edit."""
    learnt.clear()
    left.clear()


def leave(method: str, model: Any, names: Sequence[str]) -> None:
    """Note what an edit has left, for :func:`goes_on`."""
    left[method] = _state(model, names)


def goes_on(method: str, model: Any, names: Sequence[str]) -> bool:
    """Whether an edit follows the last one: not on another model, in other weights, or where that one was taken back.

    ``BaseEditor`` tells no method of this. What was put back by :func:`.set_memory` is of the edit that comes next.
    """
    return method not in left or left[method] == _state(model, names)


def _state(model: Any, names: Sequence[str]) -> tuple[ref[Any], dict[str, int]]:
    return ref(model), {name: checksum(weight) for name, weight in read(model, names).items()}


def apply_ultraedit_to_model(
    model: Any, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: Any, **_: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """UltraEdit (arXiv 2505.14679): one solve for each edited layer, on keys and gradients normalised over all edits so far.

    The computation is EasyEdit's. Its executor is not used: that keeps the first model and lets a batch that is smaller than
    ``batch_size`` be none, takes padding for a part of the answers, and tells of no changed weights.

    Returns:
        The model, and the weights that were changed, as they were.

    Raises:
        HostError: ``half`` is set.
    """
    if hparams.half:
        raise HostError("half is true, which would make the model one of half precision for this method alone; allowed: false")
    hparams = copy.copy(hparams)
    hparams.inner_params = list(hparams.inner_params)
    weights = [f"{module.removesuffix('.weight')}.weight" for module in hparams.inner_params]
    if not goes_on("ULTRAEDIT", model, weights):
        learnt.pop("ULTRAEDIT", None)
    with _flags_kept(model):
        editor = submodule("models.ultraedit.ULTRAEDIT").ULTRAEDIT(model, hparams, None)
        editor.shift = True  # a causal model's, whatever its name
        for shape, normaliser in editor.lifelong_normalizer.items():
            if "ULTRAEDIT" in learnt:
                normaliser.load_state_dict({key: learnt["ULTRAEDIT"][f"{shape} {key}"] for key in normaliser.state_dict()})
        with torch.enable_grad():
            pairs = editor.cache(list(_batches(tok, requests, hparams.batch_size_once, model.device)))
        shifts = editor.predict_param_shifts(pairs)
    originals = {name: weight.detach().clone() for name, weight in read(model, weights).items()}
    editor.edit_model(shifts, False)
    learnt["ULTRAEDIT"] = {
        f"{shape} {key}": value.detach().cpu().clone()
        for shape, normaliser in editor.lifelong_normalizer.items()
        for key, value in normaliser.state_dict().items()
    }
    leave("ULTRAEDIT", model, weights)
    return model, originals


def _batches(
    tok: Any, requests: Sequence[Mapping[str, Any]], size: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Prompts with their answers, padded on the right; labels are the answers' tokens, and -100 elsewhere."""
    sequences = [edit_tokens(tok, request["prompt"], request["target_new"], device) for request in requests]
    sequences.sort(key=lambda tokens: -tokens.input_ids.shape[1])
    for start in range(0, len(sequences), size):
        batch = sequences[start : start + size]
        shape = len(batch), max(tokens.input_ids.shape[1] for tokens in batch)
        ids = torch.full(shape, tok.pad_token_id, device=device)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, tokens in enumerate(batch):
            length = tokens.input_ids.shape[1]
            ids[row, :length], mask[row, :length] = tokens.input_ids[0], 1
            labels[row, tokens.prompt_length : length] = tokens.targets
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


@cache
def simie_hyper_params() -> type:
    """SimIE's hyper-parameters: those of ROME, which it runs, and its own, in one dataclass, where EasyEdit has two files."""
    own = [("lamHyper", float, 10000.0), ("init_model", bool, True), ("solver", str, "LU")]
    return make_dataclass("SimIEHyperParams", own, bases=(submodule("models.rome").ROMEHyperParams,))


def apply_simie_to_model(
    model: Any, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: Any, **keywords: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """SimIE: edits of ROME, each made on the original model and then merged into what earlier ones have left.

    The keys and the merging are EasyEdit's. Its executor is not used: that loads ROME's settings from a path of its own, makes
    an edit too many to learn which weights there are, knows models by their names, and keeps what it has merged in the
    hyper-parameters.

    Returns:
        The model, and the weights that were changed, as they were.
    """
    module = submodule("models.simie.simie")
    originals: dict[str, torch.Tensor] = {}
    weights = [f"{hparams.rewrite_module_tmp.format(layer)}.weight" for layer in hparams.layers]
    if not goes_on("SimIE", model, weights):
        learnt.pop("SimIE", None)
    for request in requests:
        had = learnt.get("SimIE", {})
        start = {key.removeprefix("start "): tensor for key, tensor in had.items() if key.startswith("start ")}
        now = {name: weight.detach().clone() for name, weight in read(model, start).items()}
        if hparams.init_model:
            write(model, start)
        _, before = ALG_DICT["ROME"](model, tok, [request], hparams, **keywords)
        start, now = start or {name: weight.clone() for name, weight in before.items()}, now or before
        originals = now | originals
        edited = {name: weight.detach().clone() for name, weight in read(model, start).items()}
        write(model, before)
        transposed = isinstance(model.get_submodule(next(iter(start)).removesuffix(".weight")), Conv1D)
        merger = module.SimIE(lamHyper=hparams.lamHyper, init=hparams.init_model, solver=hparams.solver)
        merger.initialization("gpt2-xl" if transposed else "llama", start, model.device)  # the two that it tells apart
        merger.weights_copy = {name: weight.to(model.device, copy=True) for name, weight in now.items()}
        merger.matrix_P |= {name: had[f"P {name}"].to(model.device, copy=True) for name in start if f"P {name}" in had}
        keys = merger.cache(model, [request], tok)
        write(model, edited)
        merger.update(model, keys)
        learnt["SimIE"] = {f"start {name}": weight.cpu() for name, weight in start.items()}
        learnt["SimIE"] |= {f"P {name}": matrix.cpu() for name, matrix in merger.matrix_P.items()}
    leave("SimIE", model, weights)
    return model, originals


@contextmanager
def _flags_kept(model: Any) -> Iterator[None]:
    """For a block: which parameters want gradients is put back, and the gradients are dropped."""
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
