"""The edited weights, wherever they are kept: in their modules, or where accelerate has offloaded them to.

An offloaded module holds its tensors only while it runs; between runs they are placeholders on the meta device, and the
hook that accelerate has put on the module knows the real ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


def stored(module: nn.Module, key: str) -> Tensor | None:
    """A module's own parameter, also while it is offloaded; None where it is None."""
    parameter = getattr(module, key)
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


def fingerprint(weight: Tensor) -> str:
    """The SHA-256 of a weight's bytes."""
    return hashlib.sha256(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def runs_on(module: nn.Module) -> torch.device:
    """The device that a module computes on."""
    parameter = next(module.parameters(recurse=False))
    return torch.device(_hook(module).execution_device) if parameter.is_meta else parameter.device


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
