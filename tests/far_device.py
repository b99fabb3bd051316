"""A device that is not the CPU, for tests: with memory of its own, and without float64.

Its numbers lie on the CPU, in tensors that say that they are elsewhere. Under :class:`FarDevice` an operation on tensors here
and there fails, as CUDA's do, and one that takes or makes float64 there fails, as Metal's do. Importing this registers the
device with torch for the whole process: it belongs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("far")
aten = torch.ops.aten
_ACROSS = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}


class Far(torch.Tensor):
    """A tensor on the far device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Far:
        if inner.dtype == torch.float64:
            raise TypeError("the far device has no float64")
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="far:0",
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FarDevice(TorchDispatchMode):
    """For a block, runs what there is to run on the far device; operations that make tensors come here alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    device, in_place = kwargs.get("device"), func is aten.copy_.default
    if device is not None:
        far = torch.device(device).type == "far"
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        far = isinstance(args[0], Far) if in_place else any(isinstance(t, Far) for t in given)
    if (
        func not in _ACROSS
        and any(isinstance(t, Far) for t in given)
        and any(t.dim() and not isinstance(t, Far) for t in given)
    ):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")

    def inner(t: Any) -> Any:
        return t.inner if isinstance(t, Far) else t

    result = func(*pytree.tree_map(inner, args), **pytree.tree_map(inner, kwargs))
    if result is None:  # of operations on lists
        return None
    if in_place or (func._schema.name.endswith("_") and not func._schema.name.endswith("__")):
        return args[0]
    if kwargs.get("out") is not None:
        return kwargs["out"]
    return pytree.tree_map(lambda t: Far(t) if far and isinstance(t, torch.Tensor) else t, result)


# What torch makes without asking a mode, as torch.tensor does.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty.memory_format", lambda size, dtype=None, **_: Far(torch.empty(size, dtype=dtype)), "PrivateUse1")
_LIBRARY.impl(
    "empty_strided", lambda size, stride, dtype=None, **_: Far(torch.empty_strided(size, stride, dtype=dtype)), "PrivateUse1"
)
_LIBRARY.impl("_copy_from", lambda source, target, *_: _run(aten.copy_.default, (target, source), {}), "PrivateUse1")


def spread(model: torch.nn.Module, is_far: Callable[[str], bool]) -> None:
    """Spread a model over the far device and the CPU as accelerate does: what a module is given is moved to its weights.

    Args:
        model: of transformers.
        is_far: whether the module of a name is on the far device; the model as a whole gives its logits where ``""`` is.
    """
    for name, module in model.named_modules():
        if is_far(name):
            for kept in (module._parameters, module._buffers):
                kept.update({key: _far(tensor) for key, tensor in kept.items() if tensor is not None})
        module.forward = _moving(module.forward, "far:0" if is_far(name) else "cpu", is_model=module is model)


def _far(tensor: torch.Tensor) -> Far:
    far = Far(tensor.detach())
    return torch.nn.Parameter(far, requires_grad=tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else far


def _moving(forward: Callable[..., Any], device: str, is_model: bool) -> Callable[..., Any]:
    def to_it(values: Any) -> Any:
        return pytree.tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, values)

    def moved(*args: Any, **kwargs: Any) -> Any:
        output = forward(*to_it(args), **to_it(kwargs))
        if is_model:
            output.logits = output.logits.to(device)
        return output

    return moved
