"""Second moments: those of a plain loop, in EasyEdit's files, resumed to the bit, and never another model's."""

from __future__ import annotations

import importlib
import json
import logging
import re
import shutil
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from conftest import REFERENCE, on_main, same_state, state
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit.bench import statistics_benchmark
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.easyedit.hparams import load_hparams
from kdpo_easyedit.easyedit.statistics import needs_statistics
from kdpo_easyedit.method import statistics
from kdpo_easyedit.method.config import HPARAMS_DIR
from kdpo_easyedit.method.statistics import StatisticsError, Text

LLAMA = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 2)]
GPT2 = [f"transformer.h.{layer}.mlp.c_proj" for layer in (0, 2)]
TEXTS = [
    "Gutel Tazili works as a pilot.",
    "",
    "Mulzos Morgulgun works as a violinist, and lives where the others do; nobody knows why.",
    "Rovin",
    "Cilri Babortir works as a baker in the city that Rovin Sehirgur comes from, and Pesdar Nornirnus does too.",
    "Vantus Zumenpos works as a farmer.",
] * 2


def load(name: str, dtype: torch.dtype = torch.float32):
    """One of the two small reference models, to change at will."""
    return (
        AutoModelForCausalLM.from_pretrained(REFERENCE / name, dtype=dtype),
        AutoTokenizer.from_pretrained(REFERENCE / name),
    )


@pytest.fixture
def llama():
    return load("llama")


def by_a_plain_loop(model, sequences, name: str) -> torch.Tensor:
    """E[k kᵀ], one text at a time, in float64."""
    keys = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: keys.append(args[0][0].double()))
    with torch.no_grad():
        for ids in sequences:
            model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    rows = torch.cat(keys)
    return rows.T @ rows / len(rows)


def sequences(tok, texts=TEXTS) -> list[list[int]]:
    return [tok(text)["input_ids"] for text in texts if text]


def far_from(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("batch_tokens", "block"), [(70, 60), (2048, 512)])
@pytest.mark.parametrize(("which", "names"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_they_are_those_of_a_plain_loop_in_whatever_batches(which, names, batch_tokens, block, monkeypatch):
    """Linear and Conv1D; texts of several lengths, so that there is padding, which does not count."""
    monkeypatch.setattr(statistics, "_BLOCK", block)
    model, tok = load(which)
    found = statistics.collect(model, tok, names, TEXTS, batch_tokens=batch_tokens, quiet=True)
    assert list(found) == names
    for name, moment in found.items():
        assert moment.count == sum(map(len, sequences(tok)))
        assert moment.total.dtype == torch.float64
        assert far_from(by_a_plain_loop(model, sequences(tok), name), moment.mean) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_keys_are_what_the_model_has_and_their_sum_is_not_rounded_to_it(dtype):
    model, tok = load("llama", dtype)
    found = statistics.collect(model, tok, LLAMA, TEXTS, batch_tokens=70, quiet=True)
    for name in LLAMA:
        assert far_from(by_a_plain_loop(model, sequences(tok), name), found[name].mean) < 20 * torch.finfo(dtype).eps / 4
    exact = statistics.collect(*load("llama"), LLAMA[:1], TEXTS, quiet=True)[LLAMA[0]].mean
    assert 0 < far_from(exact, found[LLAMA[0]].mean) < 5 * torch.finfo(dtype).eps


def test_several_layers_at_once_are_each_alone_and_the_model_is_as_it_was(llama):
    model, tok = llama
    model.train()
    model.model.layers[1].eval()
    before, modes = state(model), [module.training for module in model.modules()]
    together = statistics.collect(model, tok, LLAMA, TEXTS, quiet=True)
    for name in LLAMA:
        alone = statistics.collect(model, tok, [name], TEXTS, quiet=True)[name]
        torch.testing.assert_close(together[name].total, alone.total, rtol=1e-6, atol=1e-6)
    assert same_state(before, state(model)) and modes == [module.training for module in model.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def test_nothing_above_the_highest_layer_runs(llama):
    model, tok = llama
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(1))
    statistics.collect(model, tok, LLAMA[:1], TEXTS, batch_tokens=70, quiet=True)
    assert len(seen) == 1  # the one token that shows what runs before what


def test_a_projection_that_runs_twice_a_pass_counts_twice(llama):
    model, tok = llama
    model.model.layers[2] = model.model.layers[1]
    name = "model.layers.1.mlp.down_proj"
    found = statistics.collect(model, tok, [name], TEXTS, quiet=True)[name]
    assert found.count == 2 * sum(map(len, sequences(tok)))
    assert far_from(by_a_plain_loop(model, sequences(tok), name), found.mean) < 1e-5


def test_no_batch_is_larger_than_allowed_and_every_text_is_in_one():
    lengths = [5, 300, 7, 7, 120, 1, 64]
    batches = statistics._batches(lengths, 300)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 300 for batch in batches)
    assert len(batches) == 3


def test_texts_are_cut_to_the_batch_and_to_the_models_room(llama, caplog):
    model, tok = llama
    model.config.max_position_embeddings = 12
    caplog.set_level(logging.INFO)
    found = statistics.collect(model, tok, LLAMA, TEXTS, quiet=True)
    cut = [ids[:12] for ids in sequences(tok)]
    assert found[LLAMA[0]].count == sum(map(len, cut))
    assert "were cut there" in caplog.text
    assert statistics.collect(model, tok, LLAMA, TEXTS, batch_tokens=8, quiet=True)[LLAMA[0]].count == sum(
        len(ids[:8]) for ids in cut
    )


def appending_an_end(tok, tmp_path):
    """The tokenizer, as one that puts an end token after every text."""
    tok.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    parts = json.loads(file.read_text())
    end = parts["added_tokens"][0]
    special = {"SpecialToken": {"id": end["content"], "type_id": 0}}
    parts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}, special],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {end["content"]: {"id": end["content"], "ids": [end["id"]], "tokens": [end["content"]]}},
    }
    file.write_text(json.dumps(parts))
    return AutoTokenizer.from_pretrained(tmp_path)


def test_an_end_token_that_the_tokenizer_adds_is_no_text(llama, tmp_path):
    model, tok = llama
    ending = appending_an_end(tok, tmp_path)
    ids = sequences(ending)
    assert all(len(ids) > 2 and ids[0] == ids[-1] for ids in ids)
    found = statistics.collect(model, ending, LLAMA, TEXTS, quiet=True)
    assert far_from(by_a_plain_loop(model, [i[:-1] for i in ids], LLAMA[1]), found[LLAMA[1]].mean) < 1e-5
    assert found[LLAMA[1]].count == sum(len(i) - 1 for i in ids)


def test_a_tokenizer_needs_no_token_for_padding(llama):
    model, tok = llama
    expected = statistics.collect(model, tok, LLAMA, TEXTS, quiet=True)
    tok.pad_token = None
    found = statistics.collect(model, tok, LLAMA, TEXTS, quiet=True)
    assert torch.equal(found[LLAMA[1]].total, expected[LLAMA[1]].total)


def test_an_offloaded_model_gives_the_same_and_is_known_by_the_same(llama):
    accelerate = pytest.importorskip("accelerate")
    model, tok = llama
    expected, weights = statistics.collect(model, tok, LLAMA, TEXTS, quiet=True), statistics.fingerprints(model, LLAMA)
    accelerate.cpu_offload(model)
    assert statistics.fingerprints(model, LLAMA) == weights
    found = statistics.collect(model, tok, LLAMA, TEXTS, quiet=True)
    torch.testing.assert_close(found[LLAMA[1]].total, expected[LLAMA[1]].total, rtol=1e-5, atol=1e-6)
    assert all(parameter.is_meta for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------------------
# Files.


def test_easyedit_reads_the_files_and_finds_the_same(llama, tmp_path):
    model, tok = llama
    files = statistics.make(model, tok, LLAMA, Text("people", TEXTS), tmp_path, quiet=True)
    stats = importlib.import_module("easyeditor.util.runningstats")
    for name, file in files.items():
        stat = stats.CombinedStat(mom2=stats.SecondMoment())
        assert list(stats.tally(stat, None, cache=file, sample_size=len(TEXTS), quiet=True)) == []
        assert stat.mom2.mom2.dtype == torch.float32
        assert far_from(by_a_plain_loop(model, sequences(tok), name), stat.mom2.moment().double()) < 1e-5
        torch.testing.assert_close(stat.mom2.moment().double(), statistics.read(file, model, name))
        with np.load(file, allow_pickle=False) as ours:
            stats.save_cached_state(tmp_path / "theirs.npz", stat, {"sample_size": len(TEXTS)})
            with np.load(tmp_path / "theirs.npz", allow_pickle=False) as theirs:
                assert {key: (ours[key].dtype.kind, ours[key].shape) for key in ours} == {
                    key: (theirs[key].dtype.kind, theirs[key].shape) for key in theirs
                }


def test_easyedits_layer_stats_takes_the_file_and_computes_nothing(llama, tmp_path, monkeypatch):
    model, tok = llama
    module = importlib.import_module("easyeditor.models.rome.layer_stats")
    text = Text("people", TEXTS)
    files = statistics.make(model, tok, LLAMA, text, tmp_path, dtype="float64", release=not on_main(), quiet=True)
    monkeypatch.setattr(module, "load_dataset", None)
    about = {"to_collect": ["mom2"], "sample_size": len(TEXTS), "precision": "float64"}
    stat = module.layer_stats(model, tok, LLAMA[1], tmp_path, text.dataset, progress=lambda batches, total: batches, **about)
    torch.testing.assert_close(stat.mom2.moment(), statistics.second_moment(files[LLAMA[1]]))


def test_another_text_of_the_same_name_has_another_file_and_nothing_is_named_wikipedia(llama, tmp_path):
    model, tok = llama
    one = statistics.make(model, tok, LLAMA[:1], Text("my_text", TEXTS), tmp_path, quiet=True)[LLAMA[0]]
    two = statistics.make(model, tok, LLAMA[:1], Text("my_text", [*TEXTS[:-1], "Another."]), tmp_path, quiet=True)[LLAMA[0]]
    assert re.fullmatch(r"my-text-[0-9a-f]{8}_stats", one.parent.name) and one.parent.name != two.parent.name
    assert one.name == two.name == "model.layers.0.mlp.down_proj_float32_mom2_12.npz"
    assert Text("a", ["bc", "d"]).sha256 != Text("a", ["b", "cd"]).sha256
    assert Text("../ ", []).dataset.startswith("text-")


def test_both_versions_of_easyedit_find_their_folder():
    about = "stats", "meta-llama/Llama-3", "layer", "wikipedia", 100000
    assert str(statistics.statistics_path(*about)) == "stats/Llama-3/wikipedia_stats/layer_float32_mom2_100000.npz"
    assert statistics.statistics_path(*about, release=True).parts[1] == "meta-llama_Llama-3"
    with pytest.raises(StatisticsError, match="name_or_path is empty"):
        statistics.statistics_path("stats", "", "layer", "wikipedia", 1)


def test_what_is_there_is_not_made_again_and_what_is_not_is(llama, tmp_path, monkeypatch):
    model, tok = llama
    text = Text("people", TEXTS)
    first = statistics.make(model, tok, LLAMA[:1], text, tmp_path, quiet=True)
    written = first[LLAMA[0]].stat().st_mtime_ns
    both = statistics.make(model, tok, LLAMA, text, tmp_path, quiet=True)
    assert both[LLAMA[0]].stat().st_mtime_ns == written and both[LLAMA[1]].is_file()
    monkeypatch.setattr(statistics, "collect", None)
    assert statistics.make(model, tok, LLAMA, text, tmp_path, quiet=True) == both


def test_what_they_are_of_stands_beside_them(llama, tmp_path):
    model, tok = llama
    text = Text("people", TEXTS)
    file = statistics.make(model, tok, LLAMA[:1], text, tmp_path, quiet=True)[LLAMA[0]]
    about = statistics.provenance(file)
    assert json.loads(file.with_suffix(".json").read_text()) == asdict(about)
    assert (about.model, about.layer) == (model.config.name_or_path, LLAMA[0])
    assert (about.text, about.text_sha256, about.texts) == ("people", text.sha256, len(TEXTS))
    assert about.count == sum(map(len, sequences(tok)))


def test_another_models_are_refused_and_the_same_models_in_half_precision_are_not(llama, tmp_path):
    model, tok = llama
    text = Text("people", TEXTS)
    files = statistics.make(model, tok, LLAMA, text, tmp_path, quiet=True)
    file = files[LLAMA[1]]
    statistics.read(file, load("llama", torch.bfloat16)[0], LLAMA[1])
    statistics.read(file, load("llama", torch.float16)[0], LLAMA[1])
    with torch.no_grad():
        model.get_submodule(LLAMA[1]).weight.mul_(1.5)
        model.lm_head.weight.mul_(2)
    statistics.read(file, model, LLAMA[1])  # W, and what stands above it, do not matter
    with torch.no_grad():
        model.get_submodule(LLAMA[0]).weight.mul_(1.01)
    statistics.read(files[LLAMA[0]], model, LLAMA[0])
    refused = rf"^{re.escape(str(file))}: made for .*llama', whose weights below {LLAMA[1]} are not this model's; .* remove it"
    with pytest.raises(StatisticsError, match=refused):
        statistics.read(file, model, LLAMA[1])
    with pytest.raises(StatisticsError, match=refused):
        statistics.make(model, tok, LLAMA, text, tmp_path, quiet=True)


def test_a_change_of_one_norm_beside_the_projection_is_seen(llama):
    """It is registered after the projection, and runs before it."""
    model, _ = llama
    before = statistics.fingerprints(model, LLAMA)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.mul_(1.1)
    after = statistics.fingerprints(model, LLAMA)
    assert all(before[name]["float32"] != after[name]["float32"] for name in LLAMA)


def test_a_file_of_easyedits_own_is_taken_and_the_log_says_that_nothing_is_known(llama, tmp_path, caplog):
    model, tok = llama
    file = statistics.make(model, tok, LLAMA[:1], Text("people", TEXTS), tmp_path, quiet=True)[LLAMA[0]]
    expected = statistics.read(file, model, LLAMA[0])
    assert not caplog.records
    file.with_suffix(".json").unlink()
    assert torch.equal(statistics.read(file, model, LLAMA[0]), expected)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{file}: nothing is known")


def test_a_file_put_in_anothers_place_is_not_taken_for_it(llama, tmp_path):
    model, tok = llama
    one = statistics.make(model, tok, LLAMA[:1], Text("people", TEXTS), tmp_path, quiet=True)[LLAMA[0]]
    two = statistics.make(model, tok, LLAMA[:1], Text("few", TEXTS[:1]), tmp_path, quiet=True)[LLAMA[0]]
    shutil.copy(two, one)
    with pytest.raises(StatisticsError, match=r"not the file that .*\.json beside it speaks of; remove both"):
        statistics.read(one, model, LLAMA[0])


def stored_as(file, **changes) -> None:
    with np.load(file) as arrays:
        kept = {**arrays, **changes}
    file.with_suffix(".json").unlink()
    np.savez(file, **{key: value for key, value in kept.items() if value is not None})


def test_files_that_are_wrong_are_named(llama, tmp_path):
    model, tok = llama
    text = Text("people", TEXTS)

    def file():
        shutil.rmtree(tmp_path)
        return statistics.make(model, tok, LLAMA[:1], text, tmp_path, quiet=True)[LLAMA[0]]

    def refused(file, match: str) -> None:
        with pytest.raises(StatisticsError, match=f"^{re.escape(str(file))}.*{match}"):
            statistics.read(file, model, LLAMA[0])

    stored_as(damaged := file(), **{"mom2.mom2": np.eye(3)})
    refused(damaged, r"\[3, 3\], and model.layers.0.mlp.down_proj needs \[\d+, \d+\]")
    stored_as(damaged := file(), **{"mom2.mom2": np.full((176, 176), np.nan)})
    refused(damaged, "not finite; remove it")
    stored_as(damaged := file(), **{"mom2.mom2": None})
    refused(damaged, "not a file of EasyEdit's statistics")
    stored_as(damaged := file(), **{"mom2.mom2": np.array([{"a": 1}], dtype=object)})
    refused(damaged, "allow_pickle=False")
    stored_as(damaged := file(), **{"mom2.count": 0})
    refused(damaged, "over 0 tokens")
    damaged = file()
    damaged.write_bytes(damaged.read_bytes()[:1000])
    refused(damaged, "not a file of EasyEdit's statistics")
    damaged = file()
    damaged.with_suffix(".json").write_text('{"model": "x"}')
    with pytest.raises(StatisticsError, match=r"json: it does not say what .* is of"):
        statistics.read(damaged, model, LLAMA[0])
    damaged = file()
    damaged.unlink()
    refused(damaged, "there is no such file")


# --------------------------------------------------------------------------------------------------------------------
# Stopped, and wrong.


class Killed(BaseException):
    pass


def stop_at(model, number: int) -> None:
    """Let the model's pass of that number, from one on, not come back."""
    forward, passes = model.forward, []

    def counted(*args, **kwargs):
        passes.append(1)
        if len(passes) == number:
            raise Killed
        return forward(*args, **kwargs)

    model.forward = counted


@pytest.mark.parametrize("between", [1, 2])
def test_a_run_that_was_killed_goes_on_to_the_same_numbers_to_the_bit(llama, tmp_path, monkeypatch, between):
    monkeypatch.setattr(statistics, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(statistics._Sums, "batches_between_settling", staticmethod(lambda _: between))
    model, tok = llama
    text = Text("people", TEXTS)
    monkeypatch.setattr(statistics, "collect", partial(statistics.collect, batch_tokens=70))
    whole = statistics.make(model, tok, LLAMA, text, tmp_path / "whole", quiet=True)
    passes = count_passes(model)
    stop_at(model, 2 + 5)  # after two that show the order, five batches in
    with pytest.raises(Killed):
        statistics.make(model, tok, LLAMA, text, tmp_path / "killed", quiet=True)
    (left,) = (file for file in (tmp_path / "killed").rglob("*") if file.is_file())
    assert left.suffix == ".safetensors"
    del model.forward
    before = len(passes)
    resumed = statistics.make(model, tok, LLAMA, text, tmp_path / "killed", quiet=True)
    assert len(passes) - before < 2 + 5 + 1
    for name in LLAMA:
        assert whole[name].read_bytes() == resumed[name].read_bytes()
    assert {file.suffix for file in (tmp_path / "killed").rglob("*") if file.is_file()} == {".npz", ".json"}


def count_passes(model) -> list[int]:
    passes: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("change", ["text", "model", "damage"])
def test_sums_of_something_else_are_not_gone_on_from(llama, tmp_path, monkeypatch, caplog, change):
    monkeypatch.setattr(statistics, "_SAVE_SECONDS", 0.0)
    model, tok = llama
    partial = tmp_path / "partial.safetensors"
    statistics.collect(model, tok, LLAMA, TEXTS, batch_tokens=70, partial=partial, quiet=True)
    assert partial.is_file()
    texts = TEXTS
    if change == "text":
        texts = TEXTS[1:]
    elif change == "model":
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1.01)
    else:
        partial.write_bytes(b"nothing")
    caplog.set_level(logging.INFO)
    found = statistics.collect(model, tok, LLAMA, texts, batch_tokens=70, partial=partial, quiet=True)
    assert "begun anew" in caplog.text
    assert far_from(by_a_plain_loop(model, sequences(tok, texts), LLAMA[1]), found[LLAMA[1]].mean) < 1e-5


@pytest.mark.parametrize("texts", [[], [""], ["  \n", ""]])
def test_a_text_without_text_is_refused_and_leaves_nothing(llama, tmp_path, texts):
    model, tok = llama
    with pytest.raises(StatisticsError, match="there is no text to take second moments over"):
        statistics.make(model, tok, LLAMA, Text("empty", texts), tmp_path, quiet=True)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_what_cannot_be_taken_is_refused_with_its_name(llama):
    model, tok = llama

    def refused(name: str, match: str, **about: int) -> None:
        with pytest.raises(StatisticsError, match=match):
            statistics.collect(model, tok, [name], TEXTS, quiet=True, **about)

    refused("model.layers.99.mlp.down_proj", "no module 'model.layers.99.mlp.down_proj'")
    refused("model.layers.0.mlp", r"model.layers.0.mlp is a .*modeling_llama.LlamaMLP; ")
    refused(LLAMA[0], "batch_tokens is 0", batch_tokens=0)
    model.idle = torch.nn.Linear(3, 3)
    refused("idle", "idle does not run")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e30)
    refused(LLAMA[0], f"what {LLAMA[0]} is given is not finite")


def test_the_benchmark_takes_both_ways_in_turn_and_they_agree(monkeypatch, capsys):
    monkeypatch.setattr(statistics_benchmark, "wikipedia_openings", lambda: ([text for text in TEXTS if text], []))
    statistics_benchmark.main([str(REFERENCE / "llama"), "--layers", "0", "1", "--passages", "6", "--pairs", "3"])
    head, *pairs, last = capsys.readouterr().out.splitlines()
    assert head.startswith("2 layers") and len(pairs) == 3
    assert all(float(pair.split("differ by ")[1].split()[0]) < 1e-5 for pair in pairs)
    ratios = sorted(float(pair.split(" × ")[0].split()[-1]) for pair in pairs)
    assert last == f"median of 3: {ratios[1]} × as fast, {ratios[0]} to {ratios[2]}"


@pytest.mark.parametrize(("method", "by_choice"), [("ROME", True), ("R-ROME", True), ("MEMIT", False), ("AlphaEdit", False)])
def test_a_flag_that_a_method_does_not_read_decides_nothing(method, by_choice):
    if not on_main() and method not in ("ROME", "MEMIT"):
        pytest.skip("for EasyEdit's main branch")
    assert needs_statistics(load_hparams(method, "world", {"mom2_adjustment": True}))
    assert needs_statistics(load_hparams(method, "world", {"mom2_adjustment": False})) is not by_choice
    assert not needs_statistics(load_hparams("FT", "world"))


def test_methods_of_different_models_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for method in ("ROME", "MEMIT"):
        config = yaml.safe_load((HPARAMS_DIR / method / "world.yaml").read_text())
        (tmp_path / "mine" / method).mkdir(parents=True)
        (tmp_path / "mine" / method / "own.yaml").write_text(yaml.safe_dump(config | {"model_name": f"model-of-{method}"}))
    arguments = ["--editing_method", "ROME", "MEMIT", "--hparams_dir", "mine/own", "--stats_text", "text.txt"]
    with pytest.raises(SystemExit):
        main(["statistics", *arguments])
    told = capsys.readouterr().err
    assert "set to edit different models: [('model-of-ROME', " in told and "name methods of one model" in told
