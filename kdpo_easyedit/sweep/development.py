"""The edits that settings are chosen on: none of them is reported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..bench.companions import companions, have_companions, texts_for
from ..bench.datasets import DatasetError, Request, load_requests, read_passages, read_text
from ..bench.inputs import Inputs

#: How many edits are taken where nothing else is said, and there are so many.
EDITS = 40


def read_development(
    model: str,
    model_name: Any,
    data_dir: str | None = None,
    datatype: str | None = None,
    reported: int = 0,
    size: int | None = None,
    subjects: bool = False,
    stats_text: str | None = None,
    ability_text: str | None = None,
    quiet: bool = False,
) -> Inputs:
    """Read development edits, and text; where none is named, as :func:`.read_inputs`.

    Args:
        model: the short name of its hyper-parameters.
        model_name: the model that they name.
        data_dir: a benchmark file; left out, the development edits that come with the model.
        datatype: the file's layout.
        reported: how many edits from the start of ``data_dir`` are reported, with or without those whose subject is missing.
        size: how many edits; left out, :data:`EDITS`, or as many as there are.
        subjects: leave out edits whose subject is not in the prompt.
        stats_text, ability_text: text files, a passage a line.
        quiet: show no progress.

    Raises:
        DatasetError: a file that cannot be read, no or too few edits, or a development edit that is among the reported ones.
    """
    own = companions(model, quiet) if have_companions(model) else None
    texts = texts_for(model_name)
    text = read_text(stats_text) if stats_text else texts.statistics
    ability_texts = read_passages(ability_text) if ability_text else texts.development
    load: Callable[..., list[Request]] = partial(load_requests, datatype=datatype)
    if data_dir:
        heads = [load(data_dir, size=reported, need_subject=needed) for needed in (False, subjects)] if reported else []
        shown = {request["prompt"] for head in heads for request in head}
        requests = [request for request in load(data_dir, need_subject=subjects) if request["prompt"] not in shown]
        name = Path(data_dir).name
    elif own:
        requests, name = load_requests(own.development, need_subject=subjects), f"{own.name}, development"
        shown = {request["prompt"] for request in load_requests(own.edits)}
        if both := next((request["prompt"] for request in requests if request["prompt"] in shown), None):
            raise DatasetError(f"{own.development}: {both!r} is among the edits to report, in {own.edits}")
    else:
        raise DatasetError("data_dir is missing: this model brings no edits of its own; name a benchmark file")
    if len(requests) < (size or 1):
        raise DatasetError(f"{name}: ds_size is {size or 1}, and beside those reported there are {len(requests)} edits")
    return Inputs(requests[: size or EDITS], name, text, ability_texts)
