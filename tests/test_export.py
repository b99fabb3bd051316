"""Edits as an adapter: PEFT loads it, and gives what the edited model gives."""

from __future__ import annotations

import copy
import importlib
import json
import re

import pytest
import torch
from conftest import REFERENCE, ROOT, same_state, state
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kdpo_easyedit import EditsError, apply_edits, apply_kdpo_to_model, edits_applied, revert_edits, save_edits
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.edits.adapter import TOLERANCE, adapter_of, lost_edits
from kdpo_easyedit.edits.base import load_base, says

peft = pytest.importorskip("peft")


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def changed(model, names, rank, path, scale=0.03):
    """Save changes of some rank of weights; the model is then unedited again."""
    torch.manual_seed(0)
    originals = {name: model.get_parameter(name).detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight += scale * torch.randn(len(weight), rank) @ torch.randn(rank, weight.shape[1])
    save_edits(path, model, originals)
    revert_edits(model, path)


@pytest.fixture
def file(fresh, requests, aware, tmp_path):
    """Three edits by KDPO+C, in a file; the model does not have them."""
    model, tok = fresh
    _, originals = apply_kdpo_to_model(model, tok, requests[:3], aware, return_orig_weights=True)
    path = tmp_path / "three.safetensors"
    save_edits(path, model, originals, requests[:3], aware)
    revert_edits(model, path)
    return path


def test_an_adapter_of_real_edits_gives_the_edited_models_logits(file, fresh, requests, small_world, tmp_path, capsys):
    """Conv1D, tied embeddings; the change of KDPO+C has a rank of the edits' tokens."""
    model, tok = fresh
    before = state(model)
    assert main(["export", str(file), "--lora", str(tmp_path / "lora")]) == 0
    ids = tok(f"{requests[0]['prompt']} {requests[0]['target_new']}", return_tensors="pt")["input_ids"]
    with edits_applied(model, file):
        expected = logits(model, ids)
    assert (expected - logits(model, ids)).abs().max() > 1

    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_world.folder), tmp_path / "lora")
    assert torch.allclose(logits(adapted, ids), expected, atol=2e-3)
    assert all(says(adapted, tok, request) for request in requests[:3])
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, ids), logits(model, ids)) and same_state(before, state(model))

    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    tokens = sum(len(tok(f"{r['prompt']} {r['target_new']}")["input_ids"]) for r in requests[:3])
    assert config["r"] <= tokens < 64 and config["fan_in_fan_out"]
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    said = capsys.readouterr().out
    assert f"rank {config['r']}" in said and "lost:" not in said


@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_several_layers_and_both_kinds_of_projection(base, tmp_path):
    """Wider than high and the other way round: the attention's fused projection of GPT-2 is the one, W the other."""
    model = AutoModelForCausalLM.from_pretrained(REFERENCE / base)
    names = {
        "gpt2": [f"transformer.h.{i}.{m}.weight" for i in (0, 1) for m in ("mlp.c_proj", "mlp.c_fc", "attn.c_attn")],
        "llama": [f"model.layers.{i}.mlp.{m}.weight" for i in (0, 1) for m in ("down_proj", "up_proj")],
    }[base]
    changed(model, names, 3, tmp_path / "x")
    adapter = adapter_of(model, tmp_path / "x")
    assert adapter.rank == 3 and adapter.error < 1e-5 and adapter.transposed == (base == "gpt2")
    adapter.save(tmp_path / "lora", str(REFERENCE / base))
    ids = torch.arange(5, 25).unsqueeze(0)
    plain = logits(model, ids)
    with adapter.on(model):
        hooked = logits(model, ids)
    assert torch.equal(logits(model, ids), plain)
    with edits_applied(model, tmp_path / "x"):
        expected = logits(model, ids)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    assert (expected - plain).abs().max() > 0.1
    assert torch.allclose(logits(loaded, ids), expected, atol=1e-3) and torch.allclose(hooked, expected, atol=1e-3)


def test_a_weight_that_is_tied_is_adapted_wherever_it_is_used(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    layers = model.model.layers
    layers[2].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    changed(model, ["model.layers.0.mlp.down_proj.weight"], 2, tmp_path / "x", scale=0.3)
    adapter = adapter_of(model, tmp_path / "x")
    assert sorted(adapter.factors) == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    adapter.save(tmp_path / "lora", "")
    ids = torch.arange(20).unsqueeze(0)
    with edits_applied(model, tmp_path / "x"):
        expected = logits(model, ids)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(model, tmp_path / "lora"), ids), expected, atol=1e-4)

    changed(model := LlamaForCausalLM(config), ["model.embed_tokens.weight"], 2, tmp_path / "y")
    with pytest.raises(EditsError, match=r"belongs to model\.embed_tokens, a Embedding; an adapter is for linear maps"):
        adapter_of(model, tmp_path / "y")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    changed(model, ["model.layers.0.mlp.down_proj.weight"], 2, tmp_path / "z")
    with pytest.raises(EditsError, match=r"layers\.0.* and .*layers\.2.* are one module"):
        adapter_of(model, tmp_path / "z")


def test_the_best_of_a_rank_and_what_it_loses(file, fresh, requests, tmp_path, capsys):
    model, tok = fresh
    before = model.get_parameter("transformer.h.3.mlp.c_proj.weight").detach().double().clone()
    with edits_applied(model, file):
        change = model.get_parameter("transformer.h.3.mlp.c_proj.weight").detach().double() - before
    singular = torch.linalg.svdvals(change)
    for rank in (1, 4, 200):
        adapter = adapter_of(model, file, rank)
        b, a = adapter.factors["transformer.h.3.mlp.c_proj"]
        error = (change.T - b.double() @ a.double()).norm() / change.norm()
        best = singular[rank:].square().sum().sqrt() / change.norm()
        assert adapter.rank == rank == a.shape[0] and error == pytest.approx(best.item(), abs=1e-6)
        assert adapter.error == pytest.approx(error.item(), abs=1e-6)
    found = adapter_of(model, file).rank
    tails = singular.square().flip(0).cumsum(0).flip(0).sqrt() / change.norm()
    assert tails[found] <= TOLERANCE < tails[found - 1]

    lost, never = lost_edits(model, tok, file, adapter_of(model, file, 1))
    adapter = adapter_of(model, file, 1)
    with adapter.on(model):
        assert [r["prompt"] for r in requests[:3] if not says(model, tok, r)] == [r["prompt"] for r in lost]
    assert lost and not never
    assert main(["export", str(file), "--lora", str(tmp_path / "one"), "--rank", "1"]) == 0
    said = capsys.readouterr().out
    assert said.count("is lost: ") == len(lost) and all(repr(request["prompt"]) in said for request in lost)


def test_the_whole_model_is_merged(file, fresh, tmp_path, requests):
    model, tok = fresh
    assert not says(model, tok, requests[0])
    assert main(["export", str(file), "--merge", str(tmp_path / "merged")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    apply_edits(model, file)
    assert same_state(state(model), state(again)) and says(
        again, AutoTokenizer.from_pretrained(tmp_path / "merged"), requests[0]
    )
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


def test_edits_of_float32_are_merged_into_a_copy_where_that_is_asked_for(file, fresh, tmp_path, requests, capsys):
    model, tok = fresh
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path / "copy")
    tok.save_pretrained(tmp_path / "copy")
    arguments = ["export", str(file), "--merge", str(tmp_path / "merged"), "--model", str(tmp_path / "copy")]
    assert main(arguments) == 2
    assert "is a torch.bfloat16 copy of the original" in capsys.readouterr().err and not (tmp_path / "merged").exists()
    assert main([*arguments, "--cast"]) == 0
    assert "the whole model, bfloat16" in (said := capsys.readouterr().out)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert said.count("is not said") == sum(not says(merged, tok, request) for request in requests[:3]) < 3
    assert all(says(merged, tok, request) for request in requests[:2])


def test_what_cannot_be_exported_is_told_before_anything_is_written(file, fresh, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for arguments, message in (
        (["--lora", str(tmp_path / "full")], "is there already"),
        (["--lora", "."], "is the current folder"),
        (["--lora", str(tmp_path / "new"), "--rank", "0"], "rank is 0; allowed: 1 or above"),
        (["--merge", str(tmp_path / "new"), "--model", "no/such.gguf"], "'no/such.gguf', and there is no such file"),
        (["--merge", str(tmp_path / "new"), "--model", "no/such/folder"], "the model 'no/such/folder' cannot be loaded"),
        (
            ["--merge", str(tmp_path / "new"), "--model", str(REFERENCE / "gpt2")],
            "is not the weight that the edits were made on",
        ),
    ):
        assert main(["export", str(file), *arguments]) == 2
        assert message in capsys.readouterr().err
    for arguments in ([], ["--rank", "2", "--merge", "x"], ["--cast", "--lora", "x"]):
        with pytest.raises(SystemExit):
            main(["export", str(file), *arguments])
    changed(fresh[0], ["transformer.h.3.mlp.c_proj.weight"], 1, tmp_path / "zero", scale=0)
    with pytest.raises(EditsError, match="the edits change nothing"):
        adapter_of(fresh[0], tmp_path / "zero")
    fresh[0].config.name_or_path = "some/model"
    changed(fresh[0], ["transformer.h.3.mlp.c_proj.weight"], 1, tmp_path / "elsewhere")
    with pytest.raises(EditsError, match="made on 'some/model', which is no folder here; name the model with --model"):
        load_base(tmp_path / "elsewhere")
    assert not (tmp_path / "new").exists()


def test_the_page_on_serving_answers_as_both_in_one_batch(file, fresh, requests, tmp_path, monkeypatch):
    """The page's own code, with the adapter of its own command."""
    model, tok = fresh
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= 20
    assert "kdpo export edits.safetensors --lora adapter\n" in page
    assert main(["export", str(file), "--lora", str(tmp_path / "adapter")]) == 0
    model.save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page_on_serving.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    answers = importlib.import_module("page_on_serving").answers

    asked = [(request["prompt"], edited) for request in requests[:3] for edited in (True, False)]
    said = answers(asked)

    def alone(prompt) -> str:
        ids = tok(prompt, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tok.eos_token_id)
        return tok.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    with edits_applied(model, file):
        edited = [alone(request["prompt"]) for request in requests[:3]]
    original = [alone(request["prompt"]) for request in requests[:3]]
    assert said[::2] == edited and said[1::2] == original
    assert all(text.strip().startswith(request["target_new"]) for text, request in zip(edited, requests))
    assert not any(text.strip().startswith(request["target_new"]) for text, request in zip(original, requests))
