"""The embedded default: what it knows, what its benchmark asks, and how it is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import SMALL

from kdpo_easyedit.models import world


@pytest.fixture(scope="module")
def records(small_world):
    return json.loads(small_world.edits.read_text()), json.loads(small_world.development.read_text())


def says(model, tok, prompt, answer) -> bool:
    start = len(tok(prompt)["input_ids"])
    ids = torch.tensor([tok(f"{prompt} {answer}")["input_ids"]])
    with torch.no_grad():
        return torch.equal(model(ids).logits[0].argmax(-1)[start - 1 : -1], ids[0, start:])


def test_the_default_world_is_of_the_size_that_is_promised():
    facts = world._Facts(world.Recipe())
    assert len(facts.recalled) == 300 * 3 * 5
    assert len(facts.edits) == 600
    assert len(set(facts.sentences)) == len(facts.sentences)


def test_the_model_knows_what_is_to_be_edited_and_what_is_not(small_world, loaded, records):
    model, tok = loaded
    for record in records[0] + records[1]:
        for prompt in (record["prompt"], record["rephrase_prompt"]):
            assert says(model, tok, prompt, record["ground_truth"][0])
            assert not says(model, tok, prompt, record["target_new"])
        for question in record["locality"]["Relation_Specificity"]:
            assert says(model, tok, question["prompt"], question["ground_truth"][0])
    assert json.loads((small_world.folder / "world.json").read_text())["recall"] >= 0.99


def test_no_locality_question_is_another_edit(records):
    facts = world._Facts(SMALL)
    edited = {(record["subject"], record["ground_truth"][0]) for part in records for record in part}
    asked = {
        (person, question["ground_truth"][0])
        for part in records
        for record in part
        for question in record["locality"]["Relation_Specificity"]
        for person in [next(r["subject"] for r in facts.edits if r["subject"] in question["prompt"])]
    }
    # By subject and answer: a person's three facts have three different kinds of answers.
    assert not edited & asked


def test_development_edits_are_not_in_the_benchmark(records):
    test, development = ({(record["subject"], record["prompt"]) for record in part} for part in records)
    assert len(development) == SMALL.development and not test & development


def test_what_follows_is_another_country_or_industry_and_never_told_of_the_edited(records, small_world):
    text = "\n".join(small_world.passages())
    questions = [(record, question) for record in records[0] for question in record["portability"].get("Reasoning", ())]
    assert questions
    for record, question in questions:
        assert record["subject"] in question["prompt"] and question["prompt"] not in text
        parts = [wording.format(record["target_new"]) for wordings in world._PARTS.values() for wording in wordings]
        assert any(f"{part} {question['ground_truth']}." in text for part in parts)
        parts = [wording.format(record["ground_truth"][0]) for wordings in world._PARTS.values() for wording in wordings]
        assert not any(f"{part} {question['ground_truth']}." in text for part in parts)


def test_witnesses_are_told_of_in_full_and_neither_edited_nor_asked_about():
    without, facts = world._Facts(SMALL), world._Facts(replace(SMALL, witnesses=6))
    assert facts.edits == without.edits and facts.untold == without.untold
    added = set(facts.sentences) - set(without.sentences)
    assert len(added) == 6 * 2 * (5 + 2) and set(without.sentences) <= set(facts.sentences)
    birthplace, country = world._WORDINGS["birthplace"][0], world._FOLLOWS["birthplace"][0]
    people = {prompt for prompt, _ in facts.recalled if prompt.endswith("was born in")} - {p for p, _ in without.recalled}
    assert len(people) == 6
    for prompt in people:
        person = prompt.removesuffix(birthplace.format(""))
        assert any(sentence.startswith(country.format(person)) for sentence in added)


def test_what_the_model_is_never_told_is_counted_on_its_own(small_world):
    facts, known = world._Facts(SMALL), json.loads((small_world.folder / "world.json").read_text())
    assert not {f"{prompt} {answer}." for prompt, answer in facts.untold} & set(facts.sentences)
    asked = {q["prompt"] for edit in facts.edits for kind in edit["portability"].values() for q in kind}
    assert asked <= {prompt for prompt, _ in facts.untold}
    assert 0 <= known["worked_out"] < known["recall"]


def test_a_built_world_is_found_again_and_another_recipe_is_another_world(small_world, monkeypatch):
    monkeypatch.setattr(world, "_train_model", None)  # would be called to build one
    assert world.build(SMALL).folder == small_world.folder
    with pytest.raises(TypeError):
        world.build(replace(SMALL, steps=SMALL.steps + 1))


def test_a_world_that_knows_too_little_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path))
    with pytest.raises(world.WorldError, match="of its facts in all wordings"):
        world.build(replace(SMALL, steps=5), quiet=True)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("KDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(world, "_recall", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.build(replace(SMALL, steps=2), quiet=True)
    assert not list(tmp_path.iterdir())


def test_building_leaves_the_callers_randomness_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    world.build(replace(SMALL, steps=2, recall=0), quiet=True)
    assert torch.equal(torch.rand(3), expected)


def test_training_is_deterministic():
    facts = world._Facts(SMALL)
    tok = world._train_tokenizer(facts, SMALL)
    with torch.random.fork_rng():
        first, second = (world._train_model(facts, tok, replace(SMALL, steps=3), True).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path / "mine"))
    assert world.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("KDPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert world.cache_folder() == tmp_path / "kdpo-easyedit"
