"""KDPO, knowledge editing by preference optimisation (arXiv 2406.09920), as a method of EasyEdit.

Importing this package finds EasyEdit and registers the method: ``editing_method=KDPO`` then works as any other.
"""

from .edits import EditsError, apply_edits, edits_applied, revert_edits, save_edits
from .host import build_world, register
from .hparams import HParamsError, KDPOHyperParams
from .kdpo_main import EditTrace, apply_kdpo_to_model, execute_kdpo

__version__ = "0.1.0"
__all__ = [
    "EditTrace",
    "EditsError",
    "HParamsError",
    "KDPOHyperParams",
    "apply_edits",
    "apply_kdpo_to_model",
    "build_world",
    "edits_applied",
    "execute_kdpo",
    "revert_edits",
    "save_edits",
]

register(KDPOHyperParams, apply_kdpo_to_model)
