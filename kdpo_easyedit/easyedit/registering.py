"""KDPO as one of EasyEdit's methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from ..method.config import KDPOHyperParams
from ..method.kdpo import apply_kdpo_to_model
from ..method.preference import normalised
from . import additions, main, release
from .host import ALG_DICT, IS_RELEASE, BaseEditor, easyeditor, submodule
from .loading import mend_loading
from .measuring import mend_fluency


def register() -> None:
    """Make KDPO one of EasyEdit's methods, and mend the host. Doing it again changes nothing."""
    ALG_DICT["KDPO"] = _apply_on_release if IS_RELEASE else apply_kdpo_to_model
    easyeditor.KDPOHyperParams = KDPOHyperParams
    easyeditor.apply_kdpo_to_model = apply_kdpo_to_model
    additions.register()
    if not hasattr(BaseEditor, "_mended_by_kdpo"):
        BaseEditor._mended_by_kdpo = True
        mend_loading()
        mend_fluency()
        (release if IS_RELEASE else main).mend()
        _let_kdpo_batch()
        for name in ("edit", "edit_requests", "edit_dataset", "generate_edit", "batch_edit"):
            if name in vars(BaseEditor):
                setattr(BaseEditor, name, _as_kdpo_has_it(getattr(BaseEditor, name)))


def _let_kdpo_batch() -> None:
    """Make KDPO one of those methods that ``BaseEditor.batch_edit`` is for."""
    editors = submodule("editors.batch_editor").BatchEditor
    own = editors.is_batchable_method
    editors.is_batchable_method = staticmethod(lambda alg_name: alg_name == "KDPO" or own(alg_name))


@wraps(apply_kdpo_to_model)
def _apply_on_release(*args: Any, **kwargs: Any) -> Any:
    # The release restores whatever original weights it is handed; main is always handed them, and asks itself.
    model, originals = apply_kdpo_to_model(*args, **kwargs)
    return model, originals if kwargs.get("keep_original_weight") else {}


def _as_kdpo_has_it(edit: Callable) -> Callable:
    """One of ``BaseEditor``'s ways to edit; KDPO's own editors are told what their method wants to know.

    Edits that stay and are followed by others have the paper's smaller steps, the first one too, unless the hyper-parameters
    say otherwise. Prompts and targets are measured as they are edited.
    """
    signature = inspect.signature(edit)

    @wraps(edit)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.hparams, KDPOHyperParams):
            return edit(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments
        requests = _requests(given)
        accumulate = not given.get("keep_original_weight", False) if IS_RELEASE else given.get("sequential_edit", False)
        # Of main's edits it is said that they are a sequence; the release's stay in the model, and are one if they are several.
        sequential = accumulate and (len(requests) > 1 or not IS_RELEASE)
        before = self.hparams.sequential_edit
        if before is None and sequential:
            self.hparams.sequential_edit = True
        try:
            return edit(*call.args, **call.kwargs)
        finally:
            self.hparams.sequential_edit = before

    return told


def _requests(given: dict[str, Any]) -> Any:
    """The requests of a call, put into its arguments as KDPO takes them."""
    if "prompts" not in given:
        (key,) = {"requests", "ds"} & given.keys()
        if key == "requests":
            given[key] = [normalised(request) for request in given[key]]
        return given[key]
    others = given.get("kwargs", {})
    if others.get("requests") is not None:
        others["requests"] = [normalised(request) for request in others["requests"]]
        return others["requests"]
    prompts, targets, subjects = (
        value if isinstance(value, list) else [value]
        for value in (given["prompts"], given["target_new"], others.get("subject"))
    )
    if len(subjects) != len(prompts):
        subjects = subjects[:1] * len(prompts)
    requests = [
        normalised({"prompt": prompt, "target_new": target, "subject": subject})
        for prompt, target, subject in zip(prompts, targets, subjects, strict=True)
    ]
    given["prompts"], given["target_new"] = ([request[key] for request in requests] for key in ("prompt", "target_new"))
    return requests
