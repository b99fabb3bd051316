"""KDPO, knowledge editing by preference optimisation (arXiv 2406.09920), as a method of EasyEdit.

Importing this package registers the method wherever EasyEdit is imported, before or after: ``editing_method=KDPO`` then works
as any other. Without EasyEdit, everything here works but the comparison with its methods.
"""

from . import plugin
from .edits import EditsError, apply_edits, edits_applied, revert_edits, save_edits
from .method.config import HParamsError, KDPOHyperParams
from .method.kdpo import EditTrace, apply_kdpo_to_model, execute_kdpo

__version__ = "0.2.0"
__all__ = [
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

plugin.install()
