"""EasyEdit's names that the rest of the package uses. Importing this imports EasyEdit."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

from ..plugin import import_easyedit, is_easyedit, is_release

easyeditor: Any = import_easyedit()
IS_RELEASE: bool = is_release()
NAME: str = "release" if IS_RELEASE else "main"


class HostError(ValueError):
    """Something that this EasyEdit, or this machine, cannot do; the message says what can be done instead."""


def submodule(name: str) -> Any:
    """One of EasyEdit's modules; by attributes they cannot be had, since its star imports hide them."""
    return importlib.import_module(f"easyeditor.{name}")


ALG_DICT: dict[str, Callable] = submodule("util.alg_dict").ALG_DICT
BaseEditor: Any = submodule("editors.editor").BaseEditor
EDITOR_LOG: logging.Logger = submodule("editors.editor").LOG


def replace_everywhere(name: str, old: Any, new: Any) -> None:
    """Let all of EasyEdit's modules that have imported ``old`` under a name have ``new``."""
    for module_name, its in list(sys.modules.items()):
        if is_easyedit(module_name) and getattr(its, name, None) is old:
            setattr(its, name, new)


def is_wrapper(model: Any) -> bool:
    """Whether a model is of a class that keeps edits beside its weights and decides at every run which are asked for."""
    return is_layer_wrapper(model) or getattr(model, "changes_no_weights", False)


def is_layer_wrapper(model: Any) -> bool:
    """Whether it is one of EasyEdit's own, which keep them in a layer that they have put into the wrapped model."""
    return is_easyedit(type(model).__module__)
