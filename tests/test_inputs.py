"""What is read where the user names no text or edits, in comparisons, sweeps and where settings are chosen."""

from __future__ import annotations

import json

import pytest
import yaml

from kdpo_easyedit.bench import companions
from kdpo_easyedit.bench.companions import Texts, texts_for
from kdpo_easyedit.bench.inputs import read_inputs
from kdpo_easyedit.models import packed
from kdpo_easyedit.sweep.development import read_development
from kdpo_easyedit.sweep.plan import read_plan

OPENINGS, HELD_OUT = [f"article {n}" for n in range(900)], ["held out"]
EDITS = [{"prompt": f"Person {n} lives in", "subject": f"Person {n}", "target_new": "Paris"} for n in range(3)]


@pytest.fixture
def parsed(monkeypatch):
    """The openings, and how often they are read."""
    times = []

    def wikipedia_openings():
        times.append(1)
        return OPENINGS, HELD_OUT

    monkeypatch.setattr(packed, "wikipedia_openings", wikipedia_openings)
    return times


@pytest.fixture
def edits(tmp_path):
    (tmp_path / "edits.json").write_text(json.dumps(EDITS))
    return str(tmp_path / "edits.json")


def test_text_is_for_second_moments_of_packed_models_and_for_perplexity_of_all_but_worlds(parsed):
    assert texts_for("world") == Texts() and parsed == []
    for name in ("smollm2-135m", "gemma3-270m", "some/model.gguf"):
        found = texts_for(name)
        assert (found.statistics.name, found.statistics.passages) == ("wikipedia-openings", OPENINGS[: companions.OPENINGS])
        assert found.held_out == HELD_OUT
    assert texts_for("gpt2") == Texts(None, HELD_OUT, OPENINGS[300:600]) == texts_for(("a model", "its tokenizer"))
    assert len(parsed) == 5


def test_no_text_is_installed(monkeypatch):
    def absent():
        raise packed.ModelError("not installed")

    monkeypatch.setattr(packed, "wikipedia_openings", absent)
    assert texts_for("some/model.gguf") == Texts()


def test_a_gguf_file_has_text_in_comparisons_sweeps_and_where_settings_are_chosen(parsed, edits, tmp_path):
    compared = read_inputs("mine", "some/model.gguf", edits)
    chosen = read_development("mine", "some/model.gguf", edits)
    assert len(compared.requests) == len(chosen.requests) == 3 and len(parsed) == 2
    assert compared.stats_text == chosen.stats_text == texts_for("some/model.gguf").statistics
    assert (compared.ability_texts, chosen.ability_texts) == (HELD_OUT, OPENINGS[300:600])

    settings = {"alg_name": "KDPO", "model_name": "some/model.gguf", "device": "cpu", "layers": [1]}
    (tmp_path / "hparams/KDPO").mkdir(parents=True)
    (tmp_path / "hparams/KDPO/mine.yaml").write_text(yaml.safe_dump(settings))
    sweep = {"models": str(tmp_path / "hparams/mine"), "methods": "KDPO", "data": {"three": edits}, "sizes": [1, 3]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    plan = read_plan(tmp_path / "sweep.yaml")
    for cell in plan.cells:
        inputs = plan.inputs(cell)
        assert (inputs.stats_text, inputs.ability_texts) == (compared.stats_text, HELD_OUT)


def test_the_users_own_text_comes_first(parsed, edits, tmp_path):
    (tmp_path / "mine.txt").write_text("one passage\nanother")
    text = str(tmp_path / "mine.txt")
    for inputs in (
        read_inputs("mine", "some/model.gguf", edits, stats_text=text, ability_text=text),
        read_development("mine", "some/model.gguf", edits, stats_text=text, ability_text=text),
    ):
        assert inputs.stats_text.passages == inputs.ability_texts == ["one passage", "another"]
