"""The model that a file's edits are of, loaded, and whether it says what they taught it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..method.asking import context_of
from ..method.preference import check_room, edit_tokens, normalised
from ..method.weights import runs_on
from .file import EditsError, read_header


def load_base(path: str | Path, name: str | None = None, cast: bool = False) -> tuple[PreTrainedModel, Any]:
    """The unedited model of a file of edits, and its tokenizer.

    Args:
        path: of the file.
        name: the model's folder or name; None for the header's ``base_model``, where that is a folder.
        cast: load the model in the dtype that it is stored in; otherwise in that of the edits.

    Raises:
        EditsError: the file is none of edits, or the model is not there.
    """
    header = read_header(path)
    if name is None:
        name = header["base_model"]
        if not Path(name).is_dir():
            raise EditsError(f"{path}: made on {name!r}, which is no folder here; name the model with --model")
    dtypes = {weight["dtype"].removeprefix("torch.") for weight in header["weights"].values()}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if cast else min(dtypes), use_safetensors=True)
        return model.eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise EditsError(f"the model {name!r} cannot be loaded: {' '.join(str(error).split())}") from None


def says(model: PreTrainedModel, tok: Any, request: Mapping[str, Any]) -> bool:
    """Whether a model says a request's new answer: of every token, given the prompt and the answer up to there, the likeliest.

    The prompt is put as the request's ``context`` says (:mod:`.asking`).

    Raises:
        ValueError: a request without a prompt or a target, with a context that the tokenizer does not have, or longer than the
            model takes.
    """
    complete = normalised(request)
    device = runs_on(model.get_input_embeddings())
    edit = edit_tokens(tok, complete["prompt"], complete["target_new"], device, context_of(complete))
    check_room(model, edit, complete["prompt"])
    with torch.no_grad():
        best = model(edit.input_ids).logits[0, edit.prompt_length - 1 : -1].argmax(-1)
    return torch.equal(best, edit.targets.to(best.device))
