"""What a comparison takes where nothing is named: edits that come with a model, and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..easyedit.statistics import build_world
from ..method.statistics import Text
from ..models import packed, world
from . import facts

#: How many openings of articles second moments are taken over: some 30 000 tokens.
OPENINGS = 300


@dataclass(frozen=True)
class Companions:
    """What a comparison on a model takes where nothing else is named.

    Attributes:
        edits: a benchmark file.
        name: what reports call the edits.
        development: another, of edits that are in no reported table, to choose settings on.
    """

    edits: Path
    name: str
    development: Path


@dataclass(frozen=True)
class Texts:
    """What is read where the user names no text.

    Attributes:
        statistics: for second moments; None where they are there already, or EasyEdit takes the dataset that the
            hyper-parameters name.
        held_out: for perplexity.
        development: for perplexity where settings are chosen.
    """

    statistics: Text | None = None
    held_out: Sequence[str] = ()
    development: Sequence[str] = ()


def have_companions(hparams_name: str) -> bool:
    """Whether a model brings its own edits: the worlds, and the packed models, whatever folder their YAMLs are in."""
    hparams_name = Path(hparams_name).name
    return hparams_name in world.RECIPES or hparams_name in packed.MODELS


def main_job_size(hparams_name: str) -> int:
    """How many of a model's own edits the main job makes: it is to end within minutes."""
    return 20 if Path(hparams_name).name in world.RECIPES else 2


def companions(hparams_name: str, quiet: bool = False) -> Companions:
    """The edits that come with a model; a world is built for it."""
    hparams_name = Path(hparams_name).name
    if hparams_name in world.RECIPES:
        built = build_world(world.RECIPES[hparams_name], quiet)
        return Companions(built.edits, "the world's own edits", built.development)
    return Companions(facts.FILES["reported"], "real facts", facts.FILES["development"])


def texts_for(model_name: Any) -> Texts:
    """Openings of Wikipedia articles, of no world, and where their wheel is installed.

    Args:
        model_name: as hyper-parameters have it. Second moments are taken over them for models from wheels and GGUF files alone.
    """
    if model_name in world.RECIPES:
        return Texts()
    try:
        openings, held_out = packed.wikipedia_openings()
    except packed.ModelError:
        return Texts()
    statistics = Text("wikipedia-openings", openings[:OPENINGS]) if packed.is_packed(str(model_name)) else None
    return Texts(statistics, held_out, openings[OPENINGS : 2 * OPENINGS])
