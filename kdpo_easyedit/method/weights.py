"""The edited weights, wherever they are kept: in their modules, or where accelerate has offloaded them to.

An offloaded module holds its tensors only while it runs; between runs they are placeholders on the meta device, and the
hook that accelerate has put on the module knows the real ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


def stored(module: nn.Module, key: str) -> Tensor | None:
    """A module's own parameter, also while it is offloaded; None where it has none of that name."""
    parameter = getattr(module, key, None)
    return parameter if parameter is None or not parameter.is_meta else _hook(module).weights_map[key]


def read(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """A model's parameters by name: the tensors themselves, not copies."""
    return {name: stored(*_locate(model, name)).detach() for name in names}  # type: ignore[union-attr]


def write(model: nn.Module, weights: Weights) -> None:
    """Write weights into a model's parameters of the same names, in the parameters' dtype and place."""
    with torch.no_grad():
        for name, weight in weights.items():
            module, key = _locate(model, name)
            parameter = getattr(module, key)
            if parameter.is_meta:
                _replace(_hook(module).weights_map, key, weight.to("cpu", parameter.dtype, copy=True))
            else:
                parameter.copy_(weight)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What a weight of this dtype is edited in: float32, but for float64, whose digits that would cut."""
    return torch.promote_types(dtype, torch.float32)


def fingerprint(weight: Tensor) -> str:
    """The SHA-256 of a weight's bytes."""
    return hashlib.sha256(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def checksum(weight: Tensor) -> int:
    """64 bits that tell one state of a weight from another, from one pass over it where it lies.

    A change of one number, or of numbers that have nothing to do with one another, gives another sum, but for one chance in
    2⁶⁴. It is no hash: the same rows in another order have the same sum, and whoever wants to can make two weights that do.
    """
    rows = weight.detach().contiguous()
    if rows.storage_offset() * rows.element_size() % 8:  # a part of a larger one, that cannot be read as larger numbers
        rows = rows.clone()
    whole = rows.shape[-1] * rows.element_size() % 8 == 0
    columns = rows.view(torch.int64 if whole else _INTEGERS[rows.element_size()]).sum(0, dtype=torch.int64)
    odd = torch.arange(1, 2 * len(columns), 2, device=columns.device) * 6364136223846793005
    return int((columns * odd).sum())


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# The states of weights that edits have led to, by model and name: what tells whether a model holds an edit.
_EDITED: WeakKeyDictionary[nn.Module, dict[str, set[int]]] = WeakKeyDictionary()


def note_edit(model: nn.Module, before: Weights, after: Weights) -> None:
    """Let a model that has the weights ``after`` be known as one that holds an edit."""
    states = _EDITED.setdefault(model, {})
    for name, weight in after.items():
        left = checksum(weight)
        if left != checksum(before[name]):
            states.setdefault(name, set()).add(left)


def holds_edit(model: nn.Module) -> bool:
    """Whether some weight of a model is now what an edit that was made here, or applied from a file, has left.

    Edits that were taken back do not count, whoever took them back; nor do those of a copy's original, unless
    :func:`copy_notes` was told of the copy.
    """
    names = [name for name in _EDITED.get(model, ()) if _has(model, name)]
    return any(checksum(weight) in _EDITED[model][name] for name, weight in read(model, names).items())


def copy_notes(model: nn.Module, copy: nn.Module) -> None:
    """Let what is known of a model be known of its copy."""
    if model in _EDITED:
        _EDITED[copy] = {name: set(states) for name, states in _EDITED[model].items()}


def runs_on(module: nn.Module) -> torch.device:
    """The device that a module computes on: that of its own first parameter, or of its parts'."""
    owner, parameter = next((m, p) for m in module.modules() for p in m.parameters(recurse=False))
    return torch.device(_hook(owner).execution_device) if parameter.is_meta else parameter.device


def users(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules whose weight is the parameter of this name: the one that the name says, and those that are tied to it."""
    module, key = _locate(model, name)
    parameter = module._parameters[key]
    return [module, *(m for m in model.modules() if m is not module and any(p is parameter for p in m._parameters.values()))]


def _has(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_parameter(name), nn.Parameter)
    except AttributeError:
        return False


def _locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, key = name.rpartition(".")
    return model.get_submodule(owner), key


def _hook(module: nn.Module) -> Any:
    hook: Any = module._hf_hook
    return next(h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "weights_map", None) is not None)


def _replace(kept: Any, key: str, tensor: Tensor) -> None:
    """Put a tensor where an offloaded module takes it from; one that was on disk is in memory from then on."""
    if hasattr(kept, "prefix"):  # accelerate's view of all modules' tensors
        kept, key = kept.dataset, kept.prefix + key
    tensors: MutableMapping[str, Tensor] = getattr(kept, "state_dict", kept)
    tensors[key] = tensor
