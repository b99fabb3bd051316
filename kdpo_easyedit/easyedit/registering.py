"""KDPO as one of EasyEdit's methods."""

from __future__ import annotations

from functools import wraps
from typing import Any

from ..method.config import KDPOHyperParams
from ..method.kdpo import apply_kdpo_to_model
from . import main, release
from .host import ALG_DICT, IS_RELEASE, BaseEditor, easyeditor
from .loading import mend_loading
from .measuring import mend_fluency


def register() -> None:
    """Make KDPO one of EasyEdit's methods, and mend the host. Doing it again changes nothing."""
    ALG_DICT["KDPO"] = _apply_on_release if IS_RELEASE else apply_kdpo_to_model
    easyeditor.KDPOHyperParams = KDPOHyperParams
    easyeditor.apply_kdpo_to_model = apply_kdpo_to_model
    if not hasattr(BaseEditor, "_mended_by_kdpo"):
        BaseEditor._mended_by_kdpo = True
        mend_loading()
        mend_fluency()
        (release if IS_RELEASE else main).mend()


@wraps(apply_kdpo_to_model)
def _apply_on_release(*args: Any, **kwargs: Any) -> Any:
    # The release restores whatever original weights it is handed; main is always handed them, and asks itself.
    model, originals = apply_kdpo_to_model(*args, **kwargs)
    return model, originals if kwargs.get("keep_original_weight") else {}
