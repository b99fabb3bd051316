"""KDPO, knowledge editing by preference optimisation (arXiv 2406.09920), as a method of EasyEdit.

Importing this package registers the method wherever EasyEdit is imported, before or after: ``editing_method=KDPO`` then works
as any other. Without EasyEdit, everything here works but the comparison with its methods.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import plugin

if TYPE_CHECKING:
    from .edits import EditsError, apply_edits, edits_applied, revert_edits, save_edits
    from .method.config import HParamsError, KDPOHyperParams
    from .method.kdpo import EditFailed, EditTrace, apply_kdpo_to_model, execute_kdpo

__version__ = "0.2.0"
__all__ = [
    "EditFailed",
    "EditTrace",
    "EditsError",
    "HParamsError",
    "KDPOHyperParams",
    "apply_edits",
    "apply_kdpo_to_model",
    "edits_applied",
    "execute_kdpo",
    "revert_edits",
    "save_edits",
]

# Where a public name stands. Each is imported when it is asked for: the command line sets how torch's threads wait before
# torch is imported, and answers --help without it.
_WHERE = {
    **dict.fromkeys(("EditsError", "apply_edits", "edits_applied", "revert_edits", "save_edits"), "edits"),
    **dict.fromkeys(("HParamsError", "KDPOHyperParams"), "method.config"),
    **dict.fromkeys(("EditFailed", "EditTrace", "apply_kdpo_to_model", "execute_kdpo"), "method.kdpo"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


plugin.install()
