"""A method that fails in the middle of an edit leaves the model as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..method.weights import read, write
from ..plugin import is_easyedit
from .lifelong import forget, learnt, left

# The edits that WISE keeps in its module, to train on them again.
_HISTORIES = ("edit_history", "merge_group_edit_history")


@contextmanager
def as_it_was_on_failure(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """For a block that edits a model: any exception leaves the model with its modules, hooks, modes and flags, and weights.

    Args:
        names: the weights that the block may change. Those of EasyEdit's own layers in the model are known.
    """
    weights = {name: weight.to("cpu", copy=True) for name, weight in read(model, names).items()}
    inside = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _of_easyedit(model)]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(module, _attributes(module)) for module in model.modules()]
    memories = [(its, _memory(its)) for name, its in list(sys.modules.items()) if is_easyedit(name)]
    learnt_before, left_before = dict(learnt), dict(left)
    try:
        yield
    except BaseException:
        for module, attributes in modules:
            _restore(module, attributes)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        write(model, weights)
        with torch.no_grad():
            for tensor, value in inside:
                tensor.copy_(value)
        for its, kept in memories:
            vars(its).update(kept)
        forget()
        learnt.update(learnt_before)
        left.update(left_before)
        raise


def check_finite(weights: dict[str, torch.Tensor]) -> None:
    """Whether an edit has left numbers.

    Raises:
        ArithmeticError: it has not.
    """
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            hint = ": its range may be too narrow for the method; try dtype: bfloat16" if weight.dtype == torch.float16 else ""
            raise ArithmeticError(f"the edit leaves numbers in {name}, of {weight.dtype}, that are not finite{hint}")


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module holds: each attribute, and of a dictionary or list, submodules and hooks among them, its content."""
    return {key: (value, value.copy() if isinstance(value, (dict, list)) else None) for key, value in vars(module).items()}


def _restore(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    for value, content in attributes.values():
        if isinstance(value, dict):  # the same one: the handles of hooks know it
            value.clear()
            value.update(content)
        elif isinstance(value, list):
            value[:] = content
    vars(module).clear()
    vars(module).update({key: value for key, (value, _) in attributes.items()})


def _of_easyedit(model: nn.Module) -> list[torch.Tensor]:
    """The tensors, gradients' graphs aside, that EasyEdit's layers in a model compute with."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if is_easyedit(type(module).__module__):
            kept = [item for value in vars(module).values() for item in (value if isinstance(value, list) else [value])]
            tensors = [item for item in kept if isinstance(item, torch.Tensor) and item.is_leaf]
            found |= {id(tensor): tensor for tensor in (*tensors, *module.parameters())}
    return list(found.values())


def _memory(its: Any) -> dict[str, Any]:
    """What a module of EasyEdit's keeps of the edits so far: WISE's, and the keys of AlphaEdit's and its kin."""
    kept: dict[str, Any] = {name: list(vars(its)[name]) for name in _HISTORIES if isinstance(vars(its).get(name), list)}
    if "cache_c_new" in vars(its):
        kept["cache_c_new"] = its.cache_c_new
        if its.cache_c_new:
            kept["cache_c"] = its.cache_c.clone()  # which is added to in place
    return kept
