"""Edits as a file: there and back to the bit, on the right model only."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import interrupt_second_write, same_state, state
from safetensors.torch import load_file, save_file
from test_kdpo import says
from transformers import AutoModelForCausalLM

import kdpo_easyedit
from kdpo_easyedit import EditsError, apply_edits, apply_kdpo_to_model, edits_applied, execute_kdpo, revert_edits, save_edits
from kdpo_easyedit.edits import read_header

W = "transformer.h.3.mlp.c_proj.weight"


@pytest.fixture
def file(fresh, requests, hparams, tmp_path):
    """One edit, in a file; the model has it."""
    model, tok = fresh
    _, originals = apply_kdpo_to_model(model, tok, requests[:1], hparams, return_orig_weights=True)
    path = tmp_path / "one.safetensors"
    save_edits(path, model, originals, requests[:1], hparams, license="MIT")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_apply_then_revert_gives_back_the_original_bits(small_world, loaded, requests, hparams, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(small_world.folder, dtype=dtype)
    before = state(model)
    # 1.0 + 1e-9 − 1.0 is 0 in floating point: what a difference of numbers would lose.
    with torch.no_grad():
        model.get_parameter(W)[0, :3] = torch.tensor([1e-9, -0.0, 7.0])
        before = state(model)
    _, originals = apply_kdpo_to_model(model, loaded[1], requests[:3], hparams, return_orig_weights=True)
    edited = state(model)
    save_edits(tmp_path / "x", model, originals)
    revert_edits(model, tmp_path / "x")
    assert same_state(before, state(model))
    assert torch.signbit(model.get_parameter(W)[0, 1])
    apply_edits(model, tmp_path / "x")
    assert same_state(edited, state(model)) and model.get_parameter(W).dtype == dtype


def test_the_header_tells_what_it_is(file, fresh, requests, hparams):
    header = read_header(file)
    assert header["base_model"] == fresh[0].config.name_or_path and header["license"] == "MIT"
    assert header["requests"] == [{key: requests[0][key] for key in ("prompt", "target_new", "subject")}]
    assert header["hparams"]["lr"] == hparams.lr and header["versions"]["torch"] == torch.__version__
    assert list(header["weights"]) == [W] == list(load_file(file))


def test_two_files_are_stacked_and_taken_off_in_reverse(file, fresh, requests, hparams, tmp_path):
    model, tok = fresh
    once = state(model)
    _, originals = apply_kdpo_to_model(model, tok, requests[1:2], hparams, return_orig_weights=True)
    second = tmp_path / "two.safetensors"
    save_edits(second, model, originals, requests[1:2], hparams)
    twice = state(model)
    with pytest.raises(EditsError, match="take them off in reverse"):
        revert_edits(model, file)
    revert_edits(model, second)
    assert same_state(once, state(model))
    revert_edits(model, file)
    with pytest.raises(EditsError, match="in the order they were made in"):
        apply_edits(model, second)
    apply_edits(model, file)
    apply_edits(model, second)
    assert same_state(twice, state(model))


def test_one_model_answers_as_both(file, small_world, loaded, requests):
    model = AutoModelForCausalLM.from_pretrained(small_world.folder)
    before = state(model)
    assert not says(model, loaded[1], requests[0])
    with edits_applied(model, file):
        assert says(model, loaded[1], requests[0])
    assert same_state(before, state(model))
    with pytest.raises(RuntimeError, match="inside"), edits_applied(model, file):
        raise RuntimeError("inside")
    assert same_state(before, state(model))


def test_another_base_is_refused_and_left_alone(file, small_world):
    model = AutoModelForCausalLM.from_pretrained(small_world.folder)
    with torch.no_grad():
        model.get_parameter(W)[0, 0] += 1
    before = state(model)
    with pytest.raises(EditsError, match="is not the weight that the edits were made on"):
        apply_edits(model, file)
    with pytest.raises(EditsError, match=r"was torch.float32 .* and is torch.float16"):
        apply_edits(copy.deepcopy(model).half(), file)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(EditsError, match=f"this model has no {W}"):
        apply_edits(other, file)
    assert same_state(before, state(model))


def test_an_interruption_leaves_the_model_as_it_was(small_world, loaded, requests, hparams, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(small_world.folder)
    before = state(model)
    hparams.layers = [2, 3]
    _, originals = apply_kdpo_to_model(model, loaded[1], requests[:1], hparams, return_orig_weights=True)
    save_edits(tmp_path / "x", model, originals)
    revert_edits(model, tmp_path / "x")
    written = interrupt_second_write(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        apply_edits(model, tmp_path / "x")
    monkeypatch.undo()
    assert len(written) == 4 and same_state(before, state(model))


def test_files_of_something_else_are_refused(tmp_path, loaded):
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "text").write_text("hello")
    for name, message in (
        ("plain.safetensors", "not a file of edits"),
        ("text", "not a file of edits"),
        ("none", "no such file"),
    ):
        with pytest.raises(EditsError, match=message):
            apply_edits(loaded[0], tmp_path / name)


def test_a_file_is_written_whole_or_not_at_all(fresh, tmp_path, monkeypatch):
    model, _ = fresh
    originals = {W: model.get_parameter(W).detach().clone()}
    monkeypatch.setattr(kdpo_easyedit.edits.file, "save_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_edits(tmp_path / "x", model, originals)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_saved_half_precision_model_gives_the_same_logits(small_world, loaded, requests, hparams, tmp_path, dtype):
    from kdpo_easyedit.bench.protocols import _save_model

    model = AutoModelForCausalLM.from_pretrained(small_world.folder, dtype=dtype)
    apply_kdpo_to_model(model, loaded[1], requests[:3], hparams)
    _save_model(model, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    ids = loaded[1](requests[0]["prompt"], return_tensors="pt")
    with torch.no_grad():
        logits, expected = again(**ids).logits, model(**ids).logits
    assert again.dtype == dtype and torch.equal(logits, expected) and torch.isfinite(logits).all()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_edits_without_originals_are_refused(fresh, requests, hparams, tmp_path):
    model, tok = fresh
    _, originals = apply_kdpo_to_model(model, tok, requests[:1], hparams)
    assert originals == {}
    with pytest.raises(EditsError, match="return_orig_weights=True"):
        save_edits(tmp_path / "x", model, originals, requests[:1], hparams)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("state_", ["before", "after"])
def test_numbers_that_are_not_finite_are_not_saved(fresh, tmp_path, number, state_):
    model, _ = fresh
    originals = {W: model.get_parameter(W).detach().clone()}
    with torch.no_grad():
        (model.get_parameter(W) if state_ == "after" else originals[W])[1, 2] = number
    with pytest.raises(EditsError, match=f"{W} holds numbers that are not finite {state_} the edits"):
        save_edits(tmp_path / "x", model, originals)
    assert list(tmp_path.iterdir()) == []


def test_an_edit_on_top_of_a_file_follows_it(file, small_world, loaded, requests, hparams):
    model, tok = AutoModelForCausalLM.from_pretrained(small_world.folder), loaded[1]
    apply_edits(model, file)
    assert execute_kdpo(model, tok, requests[1], hparams)[1].sequential
    revert_edits(model, file)
    assert not execute_kdpo(model, tok, requests[1], hparams)[1].sequential
