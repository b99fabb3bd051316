"""The embedded default: what it knows, what its benchmark asks, and how it is kept."""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import SMALL, same_state
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit.cli.main import main
from kdpo_easyedit.easyedit.statistics import build_world, statistics_file
from kdpo_easyedit.method import statistics
from kdpo_easyedit.models import muon, world


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
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_interrupted_build_is_no_world(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("KDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(world, "_recall", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.build(replace(SMALL, steps=2), quiet=True)
    assert not list(tmp_path.glob("gpt2-world-*/"))


def test_a_stopped_training_goes_on_and_ends_at_the_same_bits(tmp_path, monkeypatch):
    recipe, took, step = replace(SMALL, steps=10, recall=0), [], world.Muon.step

    def counted(self):
        took.append(self)
        if len(took) == stop_at:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(world, "_KEPT_EVERY", 4)
    monkeypatch.setattr(world.Muon, "step", counted)
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path / "stopped"))
    stop_at = 7
    with pytest.raises(KeyboardInterrupt):
        world.build(recipe, quiet=True)
    took, stop_at = [], None
    stopped = world.build(recipe, quiet=True)
    assert len(took) == 10 - 4
    assert not list((tmp_path / "stopped").glob("building-*"))

    monkeypatch.setenv("KDPO_CACHE", str(tmp_path / "whole"))
    whole = world.build(recipe, quiet=True)
    assert (stopped.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()


def test_of_several_that_want_a_world_one_trains_it(tmp_path, monkeypatch):
    made = []

    def make(facts, recipe, folder, *_):
        made.append(folder)
        time.sleep(0.3)
        folder.mkdir()

    monkeypatch.setenv("KDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(world, "_make", make)
    with ThreadPoolExecutor(3) as pool:
        built = list(pool.map(world.build, [SMALL] * 3, [True] * 3))
    assert len(made) == 1 and {one.folder for one in built} == {built[0].folder} and built[0].folder.is_dir()


def test_building_leaves_the_callers_randomness_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    world.build(replace(SMALL, steps=2, recall=0), quiet=True)
    assert torch.equal(torch.rand(3), expected)


def test_training_is_deterministic_with_any_number_of_threads_and_leaves_that_number_alone():
    facts = world._Facts(SMALL)
    tok = world._train_tokenizer(facts, SMALL)
    before, states = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            states.append(world._train_model(facts, tok, replace(SMALL, steps=3), True).state_dict())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert same_state(*states)


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)], ids=str)
def test_muon_is_torchs_but_for_its_rounding(shape):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(start) for start in torch.randn(1, *shape).expand(2, -1, -1).clone())
    optimizers = muon.Muon([ours], 0.02, 0.1), torch.optim.Muon([theirs], 0.02, 0.1)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    # Torch computes in bfloat16, of eight bits; a step moves a weight by 0.005 or so.
    torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=0)


def test_a_matrix_is_made_orthogonal_in_float32():
    torch.manual_seed(0)
    matrix = torch.randn(64, 200)
    found = muon.orthogonalised(matrix)
    values = torch.linalg.svdvals(found)
    assert found.dtype == torch.float32 and values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(found, muon.orthogonalised(matrix.double()).float(), atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# The world that comes with the package.


@pytest.fixture(scope="module")
def shipped():
    return world.World(world.SHIPPED)


@pytest.fixture(scope="module")
def shipped_model():
    return AutoModelForCausalLM.from_pretrained(world.SHIPPED), AutoTokenizer.from_pretrained(world.SHIPPED)


def test_what_is_shipped_is_what_its_manifest_says_and_of_todays_recipe():
    recipe = world.RECIPES[world.NAME]
    manifest = json.loads((world.SHIPPED / "manifest.json").read_text())
    assert manifest["recipe"] == asdict(recipe)
    assert manifest["hash"] == world._hash(recipe, world._Facts(recipe)), "run build-world anew"
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in world.SHIPPED.iterdir()}
    files.pop("manifest.json")
    assert files == manifest["files"]


def test_the_shipped_texts_and_tokenizer_follow_from_the_recipe(tmp_path):
    recipe = world.RECIPES[world.NAME]
    facts = world._Facts(recipe)
    world._write_texts(facts, recipe, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"edits.json", "development.json", "text.txt"}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (world.SHIPPED / file.name).read_bytes()
    # The layout of the file around them is tokenizers' own, and may change with its version.
    made = json.loads(world._train_tokenizer(facts, recipe).backend_tokenizer.to_str())["model"]
    kept = json.loads((world.SHIPPED / "tokenizer.json").read_text())["model"]
    assert (made["vocab"], made["merges"]) == (kept["vocab"], kept["merges"])


def test_the_shipped_model_knows_its_world(shipped, shipped_model):
    facts, known = world._Facts(world.RECIPES[world.NAME]), json.loads((shipped.folder / "world.json").read_text())
    recall = world._recall(*shipped_model, facts.recalled)
    assert recall >= 0.99 and recall == pytest.approx(known["recall"], abs=1e-3)
    assert all(tensor.dtype == torch.float32 for tensor in shipped_model[0].state_dict().values())


def test_the_shipped_second_moments_are_the_models(shipped, shipped_model, tmp_path):
    recipe = world.RECIPES[world.NAME]
    moments = shipped.second_moments()
    assert set(moments) == set(recipe.projections)
    name = recipe.projections[1]
    fresh = statistics.collect(*shipped_model, [name], shipped.passages()[: recipe.samples], quiet=True)[name]
    assert moments[name].count == fresh.count
    torch.testing.assert_close(moments[name].mean, fresh.mean, rtol=0, atol=1e-4 * float(fresh.mean.abs().max()))


def test_nothing_but_a_shipped_world_is_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(world.WorldError, match="no world of the package's"):
        world.ship(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_the_command_writes_a_world_as_the_package_carries_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(world.RECIPES, world.NAME, replace(SMALL, steps=2, recall=0))
    assert main(["build-world", "--into", str(tmp_path / "made")]) == 0
    assert "recall" in capsys.readouterr().out
    made = world.World(tmp_path / "made")
    assert {path.name for path in made.folder.iterdir()} >= {path.name for path in world.SHIPPED.iterdir()}
    moments = made.second_moments().values()
    assert {tuple(moment.total.shape) for moment in moments} == {(SMALL.inner, SMALL.inner)}
    assert all(moment.count > 0 for moment in moments)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_the_default_world_is_there_at_once_with_its_statistics(tmp_path, monkeypatch):
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(world, "_make", None)  # would be called to train
    monkeypatch.setattr(statistics, "collect", None)  # to take statistics
    built = build_world()
    moments = built.second_moments()
    for name in world.RECIPES[world.NAME].projections:
        file = statistics_file(built.statistics, str(built.folder), name, "world", 1000)
        torch.testing.assert_close(statistics.second_moment(file), moments[name].mean)
        with np.load(file, allow_pickle=False) as stored:
            assert stored["mom2.mom2"].dtype == np.float32 and stored["sample_size"] == 1000
            assert stored["mom2.constructor"].item().endswith("SecondMoment()")
    assert not list(tmp_path.glob("building-*"))


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path / "mine"))
    assert world.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("KDPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert world.cache_folder() == tmp_path / "kdpo-easyedit"
