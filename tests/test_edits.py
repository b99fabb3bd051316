"""Edits as a file: there and back to the bit, on the right model only."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace

import pytest
import torch
from conftest import interrupt_second_write, same_state, state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_kdpo import says
from transformers import AutoModelForCausalLM

import kdpo_easyedit
from kdpo_easyedit import EditsError, apply_edits, apply_kdpo_to_model, edits_applied, execute_kdpo, revert_edits, save_edits
from kdpo_easyedit.bench.writing import write_answers
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.edits import read_header, remove_edit
from kdpo_easyedit.edits.factors import bits
from kdpo_easyedit.edits.file import read_changes

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


def test_a_model_that_is_handed_over_is_named_and_not_copied(fresh, requests, hparams, tmp_path, monkeypatch):
    model, tok = fresh
    hparams = replace(hparams, model_name=(model, tok))
    _, originals = apply_kdpo_to_model(model, tok, requests[:1], hparams, return_orig_weights=True)
    monkeypatch.setattr(type(model), "__deepcopy__", lambda *_: pytest.fail("the model is copied"), raising=False)
    save_edits(tmp_path / "one", model, originals, requests[:1], hparams)
    assert read_header(tmp_path / "one")["hparams"]["model_name"] == model.config.name_or_path


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


def test_what_is_compiled_sees_the_edits_without_compiling_anew(file, small_world, loaded, requests):
    model = AutoModelForCausalLM.from_pretrained(small_world.folder)
    ids = loaded[1](requests[0]["prompt"], return_tensors="pt")["input_ids"]
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1])
    with torch.no_grad():
        before, count = compiled(ids).logits, len(graphs)
        with edits_applied(model, file):
            assert torch.equal(compiled(ids).logits, model(ids).logits) and not torch.equal(compiled(ids).logits, before)
        assert torch.equal(compiled(ids).logits, before)
    assert count == len(graphs) > 0


def test_threads_share_the_weights_and_a_second_file_is_refused_meanwhile(file, small_world, loaded, requests):
    model = AutoModelForCausalLM.from_pretrained(small_world.folder)
    before = state(model)

    def in_a_thread():
        seen.append(says(model, loaded[1], requests[0]))
        try:
            with edits_applied(model, file):
                seen.append("applied")
        except EditsError as error:
            seen.append(str(error))

    seen: list = []
    with edits_applied(model, file):
        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
        assert says(model, loaded[1], requests[0])
    assert seen[0] is True and "is not the weight that the edits were made on" in seen[1]
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


@pytest.mark.parametrize("kept", ["file", "one_by_one"])
def test_a_file_in_which_a_bit_has_flipped_is_refused(kept, fresh, request):
    path = request.getfixturevalue(kept)
    path = path if kept == "file" else path[0]
    model, _ = fresh
    revert_edits(model, path)
    before, sound = state(model), path.read_bytes()
    path.write_bytes(sound[:-100] + bytes([sound[-100] ^ 1]) + sound[-99:])
    with pytest.raises(EditsError, match="not those that were written"):
        apply_edits(model, path)
    assert same_state(before, state(model))
    path.write_bytes(sound)
    apply_edits(model, path)


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


@pytest.fixture
def one_by_one(fresh, requests, aware, tmp_path):
    """Four edits by KDPO+C, each in its own change, in a file; the model has them. With the weight as it was."""
    model, tok = fresh
    traces = []
    _, originals = apply_kdpo_to_model(model, tok, requests[:4], aware, return_orig_weights=True, traces=traces)
    changes = [trace.factors for trace in traces]
    path = tmp_path / "four.safetensors"
    save_edits(path, model, originals, requests[:4], aware, changes=changes)
    return path, originals[W], changes


def test_edits_one_by_one_are_of_their_tokens_rank_and_give_back_every_bit(one_by_one, fresh, requests):
    path, original, _ = one_by_one
    model, tok = fresh
    edited = state(model)
    header = read_header(path)
    assert header["format"] == 2 and [request["prompt"] for request in header["requests"]] == [
        request["prompt"] for request in requests[:4]
    ]
    with safe_open(path, "pt") as file:
        factors = [file.get_tensor(f"{number}:{W}:left") for number in range(1, 5)]
    tokens = [len(tok(f"{request['prompt']} {request['target_new']}")["input_ids"]) for request in requests[:4]]
    assert all(left.shape[1] <= length for left, length in zip(factors, tokens))
    revert_edits(model, path)
    assert torch.equal(bits(model.get_parameter(W)), bits(original))
    apply_edits(model, path)
    assert same_state(edited, state(model))
    with pytest.raises(EditsError, match="not the weight that the edits were made on"):
        apply_edits(model, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_factors_give_the_same_bits_there_and_back(dtype, tmp_path):
    """Also where weights pass through 0, or are rounded away by a change of another size."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(300, 200, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight[0] = torch.tensor([1e-9, -0.0, 0.0, 7.0, 1e-5, -1e-7]).repeat(50)
        layer.weight[1] = 0
    before = state(layer)
    changes = [{"weight": (0.05 * torch.randn(200, 2), torch.randn(2, 300))} for _ in range(5)]
    with torch.no_grad():
        for change in changes:
            left, right = change["weight"]
            layer.weight.copy_(layer.weight.float() + left @ right)
    after = state(layer)
    save_edits(tmp_path / "x", layer, before, [{"prompt": str(n), "target_new": "x"} for n in range(5)], changes=changes)
    revert_edits(layer, tmp_path / "x")
    assert torch.equal(bits(layer.weight), bits(before["weight"]))
    apply_edits(layer, tmp_path / "x")
    assert torch.equal(bits(layer.weight), bits(after["weight"]))


def test_factors_take_the_room_of_their_rank(tmp_path):
    """One edit of 15 tokens, which changes W by a hundredth, in a projection of SmolLM2-135M's size."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(1536, 576, bias=False)
    before = state(layer)
    left, right = torch.randn(576, 15), torch.randn(15, 1536)
    left *= 0.01 * layer.weight.norm().item() / (left @ right).norm()
    with torch.no_grad():
        layer.weight += left @ right
    request = {"prompt": "a", "target_new": "b"}
    save_edits(tmp_path / "dense", layer, before, [request])
    save_edits(tmp_path / "factors", layer, before, [request], changes=[{"weight": (left, right)}])
    dense, factors = ((tmp_path / name).stat().st_size for name in ("dense", "factors"))
    assert dense > layer.weight.nbytes and factors < 0.1 * dense
    revert_edits(layer, tmp_path / "factors")
    assert torch.equal(bits(layer.weight), bits(before["weight"]))


def test_changes_that_are_not_the_edits_are_refused(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Linear(30, 20, bias=False)
    before = state(layer)
    left, right = torch.randn(20, 1), torch.randn(1, 30)
    with torch.no_grad():
        layer.weight += left @ right
    request = {"prompt": "a", "target_new": "b"}
    for changes, message in (
        ([], "changes are 0, and requests 1"),
        ([{"weight": (right.T, left.T)}], r"the change of edit 1 is \[30, 20\] as a product, and weight \[20, 30\]"),
        ([{"weight": (left, 0.9 * right)}], "changes do not add up to what the edits have changed in weight"),
        ([{}], "changes do not add up"),
    ):
        with pytest.raises(EditsError, match=message):
            save_edits(tmp_path / "x", layer, before, [request], changes=changes)
    assert not list(tmp_path.iterdir())


def test_edits_that_had_nothing_to_change_are_kept_one_by_one_too(fresh, requests, aware, tmp_path):
    """The model says the first answer already, so that its edit has no factors; the file goes on with the next."""
    model, tok = fresh
    known = {**requests[0], "target_new": write_answers(model, tok, [requests[0]["prompt"]], [""])[0].text.removesuffix(".")}
    path, traces = tmp_path / "none.safetensors", []
    before = state(model)
    _, originals = apply_kdpo_to_model(model, tok, [known], aware, return_orig_weights=True, traces=traces)
    assert same_state(before, state(model)) and traces[0].factors == {}
    save_edits(path, model, originals, [known], aware, changes=[{}])
    assert read_changes(path) == [{}] and read_header(path)["format"] == 2
    apply_edits(model, path)
    apply_kdpo_to_model(model, tok, requests[1:2], aware, traces=traces)
    save_edits(path, model, originals, [known, requests[1]], aware, changes=[*read_changes(path), traces[1].factors])
    edited = state(model)
    revert_edits(model, path)
    assert same_state(before, state(model))
    with edits_applied(model, path):
        assert same_state(edited, state(model))
    remove_edit(path, 2, model)
    assert read_header(path)["requests"][0]["target_new"] == known["target_new"] and read_changes(path) == [{}]


def test_some_of_the_edits_for_a_block(one_by_one, fresh, requests, file):
    path, original, changes = one_by_one
    model, tok = fresh
    revert_edits(model, path)
    before = state(model)
    with edits_applied(model, path, only=[2, 4]):
        expected = original + sum(changes[n][W][0] @ changes[n][W][1] for n in (1, 3))
        assert torch.allclose(model.get_parameter(W), expected, atol=1e-6)
        assert says(model, tok, requests[1]) and not says(model, tok, requests[0])
    assert same_state(before, state(model))
    with edits_applied(model, path, only=[]):
        assert same_state(before, state(model))
    with pytest.raises(EditsError, match="there is no edit 5; there are 1 to 4"), edits_applied(model, path, only=[1, 5]):
        pass
    with pytest.raises(EditsError, match="keeps its edits as one change"), edits_applied(model, file, only=[1]):
        pass
    assert same_state(before, state(model))


def test_one_edit_is_taken_out_and_the_others_stay(one_by_one, fresh, requests, capsys):
    path, original, changes = one_by_one
    model, tok = fresh
    revert_edits(model, path)
    assert main(["edits", "list", str(path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["1", "2", "3", "4"]
    assert main(["edits", "remove", str(path), "2"]) == 0
    said = capsys.readouterr().out
    assert repr(requests[1]["prompt"]) in said and said.count("is said") == 3
    header = read_header(path)
    assert [r["prompt"] for r in header["requests"]] == [requests[n]["prompt"] for n in (0, 2, 3)]
    apply_edits(model, path)
    expected = original.double() + sum(changes[n][W][0].double() @ changes[n][W][1].double() for n in (0, 2, 3))
    assert (model.get_parameter(W).double() - expected).abs().max() < 4e-7
    assert not says(model, tok, requests[1]) and all(says(model, tok, requests[n]) for n in (0, 2, 3))
    revert_edits(model, path)
    assert torch.equal(bits(model.get_parameter(W)), bits(original))

    for _ in range(2):
        remove_edit(path, 1, model)
    assert [r["prompt"] for r in read_header(path)["requests"]] == [requests[3]["prompt"]]
    with pytest.raises(EditsError, match="is the only one"):
        remove_edit(path, 1, model)
    with torch.no_grad():
        model.get_parameter(W)[0, 0] += 1
    with pytest.raises(EditsError, match="not the weight that the edits were made on"):
        apply_edits(model, path)


def test_an_edit_that_is_not_kept_by_itself_is_shown_and_not_removed(file, small_world, requests, capsys):
    content = file.read_bytes()
    assert main(["edits", "show", str(file), "1"]) == 0
    said = capsys.readouterr().out
    assert repr(requests[0]["prompt"]) in said and repr(requests[0]["target_new"]) in said and W in said
    assert main(["edits", "remove", str(file), "1"]) == 2
    assert "each was made where the last had left the weights" in capsys.readouterr().err
    assert main(["edits", "show", str(file), "2"]) == 2
    assert "there is no edit 2" in capsys.readouterr().err
    for arguments in (["show", str(file)], ["list", str(file), "1"]):
        with pytest.raises(SystemExit):
            main(["edits", *arguments])
    assert file.read_bytes() == content


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "factors"])
def test_edits_of_float32_are_made_on_a_copy_where_that_is_asked_for(
    one_by_one, fresh, requests, small_world, tmp_path, dtype, kind, caplog
):
    path, original, _ = one_by_one
    edited = fresh[0].get_parameter(W).detach().clone()
    if kind == "dense":
        save_edits(path, fresh[0], {W: original}, requests[:4])
    copied = AutoModelForCausalLM.from_pretrained(small_world.folder, dtype=dtype)
    before = state(copied)
    with pytest.raises(EditsError, match=f"is its {dtype} copy here; .*cast=True, or --cast"):
        apply_edits(copied, path)
    with edits_applied(copied, path, cast=True):
        assert all(says(copied, fresh[1], request) for request in requests[:4])
        made, wanted = copied.get_parameter(W).double(), edited.to(dtype).double()
        # Off by no more than the rounding of both weights to the copy's dtype.
        rounding = sum((w.to(dtype).double() - w.double()).norm() for w in (original, edited))
        assert (made - wanted).norm() < 1.5 * rounding
    assert same_state(before, state(copied)) and f"are rounded to {dtype}" in caplog.text

    with pytest.raises(EditsError, match=f"is a {dtype} copy of the original; load it in that dtype"):
        apply_edits(copied.float(), path, cast=True)
    copied.to(dtype)
    with torch.no_grad():
        copied.get_parameter(W)[0, 0] += 1
    with pytest.raises(EditsError, match="is no copy of the weight that the edits were made on"):
        apply_edits(copied, path, cast=True)
    with pytest.raises(EditsError, match=r"was torch.float32 .* when the edits were made, and is torch.float64"):
        apply_edits(copied.double(), path, cast=True)


def test_a_copys_edits_by_bit_patterns_are_numbers_around_zero_too(tmp_path):
    layer = torch.nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.001, -1.001, 1e-30, 0.3337], [0.1, 1e-9, -1e-9, 0.2]]))
        before = state(layer)
        layer.weight.copy_(torch.tensor([[0.0, -0.0, -1e-30, -0.3337], [1e-9, 0.1, 0.1, 70000]]))
    save_edits(tmp_path / "x", layer, before)
    edited = layer.weight.detach().clone()
    layer.load_state_dict(before)
    copied = copy.deepcopy(layer).bfloat16()
    apply_edits(copied, tmp_path / "x", cast=True)
    assert torch.allclose(copied.weight.float(), edited, rtol=2**-7, atol=1e-8)
    with pytest.raises(EditsError, match=r"weight would have numbers beyond those of torch\.float16"):
        apply_edits(copy.deepcopy(layer).half(), tmp_path / "x", cast=True)


def test_other_layers_that_have_changed_are_told_of(file, fresh, small_world, requests, caplog):
    model = AutoModelForCausalLM.from_pretrained(small_world.folder)
    with edits_applied(model, file):
        assert not caplog.text
    with torch.no_grad():
        model.get_parameter("transformer.h.0.mlp.c_fc.weight").mul_(1.01)
    with edits_applied(model, file):
        assert says(model, fresh[1], requests[0])
    assert "1 weights that the edits are not about differ" in caplog.text and "transformer.h.0.mlp.c_fc.weight" in caplog.text


def test_a_later_format_is_refused(tmp_path, loaded):
    save_file({W: torch.zeros(1)}, tmp_path / "x", {"kdpo_easyedit": json.dumps({"format": 3, "weights": {}})})
    with pytest.raises(EditsError, match="edits in format 3, which a later version of this package writes"):
        apply_edits(loaded[0], tmp_path / "x")
