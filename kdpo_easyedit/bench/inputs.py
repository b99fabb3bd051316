"""What a comparison is of, beside its methods: edits, and text, the user's own or what comes with the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..method.statistics import Text
from .companions import companions, have_companions, texts_for
from .datasets import DatasetError, Request, load_requests, read_passages, read_text


@dataclass(frozen=True)
class Inputs:
    """Edits and text.

    Attributes:
        requests: the edits.
        data_name: what reports call them.
        stats_text: what second moments are taken over; None where those that the hyper-parameters name are used.
        ability_texts: for perplexity; none where there are none.
    """

    requests: list[Request]
    data_name: str
    stats_text: Text | None
    ability_texts: Sequence[str]


def check_edits(model: str, data_dir: str | None) -> None:
    """Whether there are edits, before anything is read.

    Raises:
        DatasetError: no file is named, and none comes with the model.
    """
    if not data_dir and not have_companions(model):
        raise DatasetError("data_dir is missing: this model brings no edits of its own; name a benchmark file")


def need_subject(all_hparams: Iterable[Any]) -> bool:
    """Whether one of several methods edits at the subject alone, so that edits without one are left out for all alike."""
    return any("subject" in getattr(hparams, "fact_token", "") for hparams in all_hparams)


def read_inputs(
    model: str,
    model_name: Any,
    data_dir: str | None = None,
    datatype: str | None = None,
    size: int | None = None,
    shuffle: int | None = None,
    subjects: bool = False,
    stats_text: str | None = None,
    ability_text: str | None = None,
    quiet: bool = False,
    load: Callable[..., list[Request]] = load_requests,
) -> Inputs:
    """Read files; where none is named, edits that come with the model, and openings of Wikipedia articles.

    The user's files come first: what is wrong with them is told before a model is built.

    Args:
        model: the short name of its hyper-parameters.
        model_name: the model that they name.
        data_dir: a benchmark file, read with what follows by ``load``.
        subjects: leave out edits whose subject is not in the prompt.
        stats_text, ability_text: text files, a passage a line.

    Raises:
        DatasetError: a file that cannot be read, or no edits.
    """
    check_edits(model, data_dir)
    requests = load(data_dir, datatype, size, shuffle, subjects) if data_dir else []
    text = read_text(stats_text) if stats_text else None
    ability_texts: Sequence[str] = read_passages(ability_text) if ability_text else ()
    data_name = Path(data_dir or "").name
    if have_companions(model):
        own = companions(model, quiet)  # of a world the statistics too
        if not data_dir:
            requests, data_name = load(own.edits, datatype, size, shuffle, subjects), own.name
    texts = texts_for(model_name)
    return Inputs(requests, data_name, text or texts.statistics, ability_texts or texts.held_out)
