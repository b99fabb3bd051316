"""A device that is not the CPU, for tests: as many of it as are asked for, each with memory of its own, and no float64.

Numbers lie on the CPU, in tensors that say that they are elsewhere. Under :class:`Devices` an operation on tensors of two
devices fails, as CUDA's do, and one that takes or makes float64 fails, as Metal's do. This registers the device with torch for
the whole process: it belongs in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("far")
aten = torch.ops.aten
_ACROSS = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}


class Far(torch.Tensor):
    """A tensor on ``far:index``."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int) -> Far:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"far:{index}",
        )

    def __init__(self, inner: torch.Tensor, index: int) -> None:
        if inner.dtype == torch.float64:
            raise TypeError("far devices have no float64")
        self.inner, self.index = inner, index

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.inner!r}, {self.index})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """Runs what there is to run on far devices; operations that make tensors come here alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    far = [t for t in given if isinstance(t, Far)]
    device = kwargs.get("device")
    if not far and (device is None or torch.device(device).type != "far"):
        return func(*args, **kwargs)
    if device is not None:
        wanted = torch.device(device)
        kwargs = {**kwargs, "device": torch.device("cpu")}
        index = (wanted.index or 0) if wanted.type == "far" else None
    else:
        index = args[0].index if func is aten.copy_.default and isinstance(args[0], Far) else far[0].index
    if func is aten.copy_.default and not isinstance(args[0], Far):
        index = None
    if func not in _ACROSS:
        here = {t.device for t in given if t.dim() or isinstance(t, Far)}
        if len(here) > 1:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {sorted(map(str, here))}")

    def inner(t: Any) -> Any:
        return t.inner if isinstance(t, Far) else t

    def outer(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or index is None:
            return t
        return Far(t, index)

    result = func(*pytree.tree_map(inner, args), **pytree.tree_map(inner, kwargs))
    if func._schema.name.endswith("_") and not func._schema.name.endswith("__"):
        return args[0]
    if "out" in kwargs and kwargs["out"] is not None:
        return kwargs["out"]
    return pytree.tree_map(outer, result)


_LIBRARY = torch.library.Library("aten", "IMPL")


def _made(function: Any) -> Any:
    """For what torch makes without asking a mode, as ``torch.tensor`` does."""

    def make(size: Any, *args: Any, device: Any = None, dtype: Any = None, **_: Any) -> Far:
        strides = [a for a in args if isinstance(a, (list, tuple))]
        return Far(function(size, *strides, dtype=dtype), torch.device(device).index or 0)

    return make


_LIBRARY.impl("empty.memory_format", _made(torch.empty), "PrivateUse1")
_LIBRARY.impl("empty_strided", _made(torch.empty_strided), "PrivateUse1")


def place(model: torch.nn.Module, index_of: Any) -> None:
    """Spread a model over far devices, as accelerate does: what a module is given is moved to where its weights are.

    Args:
        model: of transformers.
        index_of: a module's name → the index of its device.
    """
    for name, module in model.named_modules():
        index = index_of(name)
        for kept in (module._parameters, module._buffers):
            for key, tensor in kept.items():
                if tensor is not None:
                    moved = Far(tensor.detach(), index)
                    kept[key] = (
                        torch.nn.Parameter(moved, requires_grad=tensor.requires_grad) if kept is module._parameters else moved
                    )
        module.forward = _moving(module.forward, index)
    model.forward = _moving(model.forward, index_of(""), back=True)


def _moving(forward: Any, index: int, back: bool = False) -> Any:
    def to(device: str, values: Any) -> Any:
        return pytree.tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, values)

    def moved(*args: Any, **kwargs: Any) -> Any:
        output = forward(*to(f"far:{index}", args), **to(f"far:{index}", kwargs))
        if back:
            output.logits = output.logits.to(f"far:{index}")
        return output

    return moved
