"""KDPO as one of EasyEdit's methods: registration, loading, restoring, metrics; and EasyEdit on a bare machine."""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import easyeditor
import nltk
import pytest
import torch
from conftest import on_main, same_state, state
from transformers import GPT2Tokenizer

import kdpo_easyedit
from kdpo_easyedit import KDPOHyperParams, plugin
from kdpo_easyedit.devices import device_name
from kdpo_easyedit.easyedit import host
from kdpo_easyedit.easyedit import methods as algorithms
from kdpo_easyedit.easyedit.hparams import load_hparams
from kdpo_easyedit.easyedit.measuring import edit_quality
from kdpo_easyedit.easyedit.registering import register
from kdpo_easyedit.easyedit.statistics import statistics_file


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python afresh; an empty value takes a variable away."""
    env = {key: value for key, value in {**os.environ, **environment}.items() if value}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """EasyEdit writes ./logs."""
    monkeypatch.chdir(tmp_path)


def test_kdpo_is_registered_and_importing_again_changes_nothing():
    apply, init = host.ALG_DICT["KDPO"], host.BaseEditor.__init__
    assert easyeditor.KDPOHyperParams is KDPOHyperParams
    assert easyeditor.apply_kdpo_to_model is kdpo_easyedit.apply_kdpo_to_model
    register()
    assert host.BaseEditor.__init__ is init
    assert host.ALG_DICT["KDPO"].__wrapped__ is apply.__wrapped__ if host.IS_RELEASE else host.ALG_DICT["KDPO"] is apply


def arguments(requests: list[dict]) -> dict:
    """Requests as ``BaseEditor.edit`` takes them."""
    locality = [request["locality"]["Relation_Specificity"] for request in requests]
    return {
        "prompts": [request["prompt"] for request in requests],
        "target_new": [request["target_new"] for request in requests],
        "ground_truth": [request["ground_truth"] for request in requests],
        "subject": [request["subject"] for request in requests],
        "rephrase_prompts": [request["rephrase_prompt"] for request in requests],
        "locality_inputs": {
            "Relation_Specificity": {key: [kind[key] for kind in locality] for key in ("prompt", "ground_truth")}
        },
        "verbose": False,
    }


def test_single_edits_are_measured_and_restored(hparams, requests):
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    before = state(editor.model)
    restoring = {} if on_main() else {"keep_original_weight": True}
    metrics, _, _ = editor.edit(**arguments(requests[:3]), **restoring)
    for entry in metrics:
        assert entry["pre"]["rewrite_acc"] < entry["post"]["rewrite_acc"] == [1.0]
        assert 0 <= entry["post"]["rephrase_acc"][0] <= 1
        assert len(entry["post"]["locality"]["Relation_Specificity_acc"]) == 4
    assert same_state(before, state(editor.model))


def test_sequential_edits_accumulate(hparams, requests):
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    copied = copy.deepcopy(editor.model)
    accumulating = {"sequential_edit": True} if on_main() else {}
    editor.edit(**arguments(requests[:2]), **accumulating)
    kdpo_easyedit.apply_kdpo_to_model(copied, editor.tok, requests[:2], hparams)  # which are known to follow one another too
    assert same_state(state(copied), state(editor.model))


@pytest.mark.parametrize("keep", [False, True])
def test_original_weights_are_returned_as_each_host_wants_them(fresh, requests, hparams, keep):
    model, tok = fresh
    edited, originals = host.ALG_DICT["KDPO"](
        model, tok, [requests[0]], hparams, copy=False, return_orig_weights=True, keep_original_weight=keep, train_ds=None
    )
    assert edited is model
    assert bool(originals) == (keep or on_main())


def test_easyedits_own_metrics_agree_with_a_plain_forward_pass(loaded, requests, hparams):
    """Padding on either side, and several prompts at once, change nothing."""
    model, tok = copy.deepcopy(loaded[0]), copy.deepcopy(loaded[1])
    prompts = [request["prompt"] for request in requests[:6]] + [requests[0]["rephrase_prompt"]]
    targets = [request["target_new"] for request in requests[:6]] + [requests[0]["target_new"]]
    expected = []
    for prompt, target in zip(prompts, targets):
        start = len(tok(prompt)["input_ids"])
        ids = torch.tensor([tok(f"{prompt} {target}")["input_ids"]])
        with torch.no_grad():
            best = model(ids).logits[0].argmax(-1)
        expected.append((best[start - 1 : -1] == ids[0, start:]).float().mean().item())
    measure = importlib.import_module("easyeditor.evaluate.evaluate").test_prediction_acc
    hparams.max_length = 4  # longer answers are not cut off
    for side in ("left", "right"):
        tok.padding_side = side
        assert measure(model, tok, hparams, prompts, targets, "cpu") == pytest.approx(expected)
        assert tok.padding_side == side and hparams.max_length == 4


@pytest.mark.parametrize("name", ["world-of-mine", "kurt5-and-chatglm", "qwen"])
def test_a_local_folder_of_any_name_loads(small_world, requests, hparams, tmp_path, name):
    shutil.copytree(small_world.folder, tmp_path / name, ignore=shutil.ignore_patterns("stats"))
    hparams.model_name = str(tmp_path / name)
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    assert editor.model_name == str(tmp_path / name)
    metrics = editor.edit(**arguments(requests[:1]))[0]
    assert metrics[0]["post"]["rewrite_acc"] == [1.0]


def test_easyedits_own_loader_takes_the_world(small_world, hparams):
    host.BaseEditor.__init__.__wrapped__(editor := object.__new__(host.BaseEditor), hparams)
    assert editor.model_name == str(small_world.folder)
    assert isinstance(editor.tok, GPT2Tokenizer)


def test_a_pair_of_model_and_tokenizer_is_taken(loaded, requests, hparams):
    hparams.model_name = loaded
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    assert editor.model is loaded[0] and editor.model_name.lower() == "gpt2"
    assert copy.deepcopy(editor.model_name) == editor.model_name


@pytest.mark.parametrize(("parallel", "dispatched", "moved"), [(False, False, ["cpu"]), (True, False, []), (False, True, [])])
def test_a_pair_is_moved_to_its_device_unless_it_is_spread_over_several(
    hparams, fresh, monkeypatch, parallel, dispatched, moved
):
    model, _ = hparams.model_name = fresh
    hparams.model_parallel = parallel
    if dispatched:
        model.hf_device_map = {"": "cpu"}
    to = []
    monkeypatch.setattr(model, "to", lambda device: to.append(str(device)))
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    assert editor.model is model and to == moved and editor.hparams.device == "cpu"


def test_a_pair_on_a_device_that_is_not_there_is_told(hparams, loaded):
    hparams.model_name, hparams.device = loaded, "cuda:63"
    with pytest.raises(host.HostError, match="device is 'cuda:63', which this machine does not have; try 'cpu'"):
        easyeditor.BaseEditor.from_hparams(hparams)


def test_every_method_is_measured_alike(loaded, requests, hparams, monkeypatch):
    """Whatever its own hyper-parameters say of the metrics."""
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    expected = edit_quality(editor, editor.model, requests[0], fluency=False)
    monkeypatch.setattr(type(editor.tok), "apply_chat_template", lambda *_, **__: pytest.fail("a chat template"))
    for own in ({"use_chat_template": True}, {"alg_name": "GRACE"}, {"max_length": 2}, {"evaluation_type": "generate-text"}):
        editor.hparams = copy.copy(hparams)
        vars(editor.hparams).update(own)
        assert edit_quality(editor, editor.model, requests[0], fluency=False) == expected
        assert vars(editor.hparams) == vars(hparams) | own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name": "no/such-model"}, "model_name is 'no/such-model', which cannot be loaded; give a folder"),
        ({"model_name": "/no/such/model"}, r"model_name is '/no/such/model', .* The reason: there is no such folder$"),
        ({"model_name": "./model"}, r"model_name is '\./model', .* The reason: there is no such folder$"),
        ({"model_name": "~/model"}, r"The reason: there is no such folder: ~ is not filled in$"),
        ({"device": 63}, "device is 63, which this machine does not have; try 'cpu'"),
        ({"device": "meta"}, "device is 'meta', which this machine does not have; try 'cpu'"),
    ],
)
def test_what_cannot_be_loaded_is_told(hparams, change, message):
    vars(hparams).update(change)
    with pytest.raises(host.HostError, match=message):
        easyeditor.BaseEditor.from_hparams(hparams)


def test_fluency_needs_no_data_of_nltk(loaded, requests, hparams, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(LookupError):
        nltk.word_tokenize("One sentence. Another one.")
    entropy = importlib.import_module("easyeditor.evaluate.evaluate_utils").n_gram_entropy
    assert entropy(["a b c d e f. a b c d e f."]) < entropy(["a b c d e f. g h i j k l."])
    hparams.model_name = loaded
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    quality = edit_quality(editor, editor.model, requests[0])
    assert 2 < quality["fluency"]["ngram_entropy"] < 8


def test_what_easyedit_samples_is_what_the_model_writes(loaded):
    """With one candidate a token, its sampling is greedy decoding: no token's view of the others is cut off."""
    model, tok = loaded
    prompt = "The profession of"
    ids = tok(prompt, return_tensors="pt")["input_ids"]
    greedy = model.generate(ids, max_length=40, do_sample=False, pad_token_id=tok.pad_token_id)
    sample = importlib.import_module("easyeditor.evaluate.evaluate_utils").generate_fast
    assert sample(model, tok, [prompt], top_k=1, max_out_len=40) == [tok.decode(greedy[0], skip_special_tokens=True)]


def test_memits_view_of_a_block_is_its_hidden_states(loaded):
    """What it adds to one token's hidden state in one sequence arrives there and nowhere else."""
    model, tok = loaded
    nethook = importlib.import_module("easyeditor.util.nethook")
    ids = torch.tensor([tok("The profession of")["input_ids"]] * 2)
    seen = []

    def edit(output, layer):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[1, 2] += 1
        seen.append(hidden.shape)
        return output

    plain = model.transformer(ids, output_hidden_states=True).hidden_states
    with torch.no_grad(), nethook.TraceDict(model, ["transformer.h.1"], edit_output=edit) as trace:
        edited = model.transformer(ids, output_hidden_states=True).hidden_states
    assert seen == [plain[2].shape]
    expected = plain[2].detach().clone()
    expected[1, 2] += 1
    output = trace["transformer.h.1"].output
    torch.testing.assert_close(output[0] if isinstance(output, tuple) else output, expected)
    torch.testing.assert_close(edited[2], expected)


def test_covariance_statistics_are_those_of_the_worlds_text(small_world, loaded):
    name = "transformer.h.1.mlp.c_proj"
    file = statistics_file(small_world.statistics, str(small_world.folder), name, "world", 1000)
    assert file.is_file()
    stats = importlib.import_module("easyeditor.util.runningstats")
    stat = stats.CombinedStat(mom2=stats.SecondMoment())
    list(stats.tally(stat, None, cache=file, sample_size=1000, quiet=True))
    model, tok = loaded
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for passage in small_world.passages():
            model(torch.tensor([tok(passage)["input_ids"]]))
    handle.remove()
    keys = torch.cat(inputs)
    torch.testing.assert_close(stat.mom2.moment(), keys.T @ keys / len(keys), rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# A bare machine.


def test_without_easyedit_the_package_works_and_the_bench_says_how_to_get_it(tmp_path):
    blocked = "import sys; sys.modules.pop('easyeditor', None); import importlib.util as u; f = u.find_spec\n"
    blocked += "u.find_spec = lambda name, *a: None if name == 'easyeditor' else f(name, *a)\nimport kdpo_easyedit"
    assert python(blocked, EASYEDIT_HOME="").returncode == 0
    result = python(blocked + "\nimport kdpo_easyedit.easyedit", EASYEDIT_HOME="")
    assert "ImportError: EasyEdit is not here. Two ways to get it: `pip install --no-deps easyeditor" in result.stderr
    assert "git clone https://github.com/zjunlp/EasyEdit" in result.stderr
    result = python("import kdpo_easyedit, easyeditor", EASYEDIT_HOME=str(tmp_path))
    assert f"EASYEDIT_HOME is '{tmp_path}', which has no easyeditor/ in it" in result.stderr


def test_absent_packages_stay_absent_for_everyone_else():
    code = """
import importlib.util, sys
absent = [p for p in ("higher", "hydra", "omegaconf", "datasets", "peft", "openai", "cv2") if not importlib.util.find_spec(p)]
import kdpo_easyedit, easyeditor
assert absent, "nothing is absent"
assert not [p for p in absent if p in sys.modules or importlib.util.find_spec(p)]
from transformers.utils import is_peft_available, is_datasets_available
assert is_peft_available() == ("peft" not in absent) and is_datasets_available() == ("datasets" not in absent)
try:
    import hydra
except ModuleNotFoundError:
    print("fine")
"""
    result = python(code)
    assert result.stdout == "fine\n", result.stderr


def test_a_stand_in_says_what_to_install():
    absent = plugin.stand_in("package.module.Thing", "install the package package")

    class Derived(absent): ...

    @absent.decorator
    def decorated():
        return 3

    assert decorated() == 3 and absent[int] is absent
    for thing in (absent, absent.anything, Derived):
        with pytest.raises(ImportError, match="install the package package"):
            thing("argument")


def test_an_installed_package_is_never_shadowed():
    module = importlib.import_module("easyeditor.evaluate.evaluate_utils")
    assert module.nltk is nltk
    import_ = importlib.import_module("easyeditor.editors.editor").__dict__["__builtins__"]["__import__"]
    assert import_("nltk") is nltk
    with pytest.raises(ModuleNotFoundError):
        import_("nltk.no_such_module")


@pytest.mark.parametrize(("device", "expected"), [(0, "cuda:0"), ("1", "cuda:1"), ("cpu", "cpu"), ("mps", "mps")])
def test_a_device_is_what_it_says(device, expected):
    assert device_name(device) == expected


@pytest.mark.skipif(not host.IS_RELEASE, reason="main has devices of its own")
def test_the_release_puts_nothing_on_cuda_by_itself():
    source = Path(importlib.import_module("easyeditor.models.ft.ft_main").__file__).read_text()
    assert "cuda:" in source
    code = importlib.import_module("easyeditor.models.ft.ft_main").execute_ft.__code__
    assert "_device" in code.co_names and "cuda:" not in code.co_consts


def test_all_four_methods_run_on_the_small_world(small_world, requests, tmp_path):
    for method in ("KDPO", "FT", "ROME", "MEMIT"):
        hparams = load_hparams(method, "world")
        hparams.model_name = str(small_world.folder)
        if hasattr(hparams, "stats_dir"):
            hparams.stats_dir = str(small_world.statistics)
        editor = easyeditor.BaseEditor.from_hparams(hparams)
        before = state(editor.model)
        edited, originals = algorithms.apply_edit(editor, editor.model, requests[0])
        changed = {name for name, tensor in edited.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == set(originals) and changed, method
        algorithms.undo_edits(editor, originals)
        assert same_state(before, state(editor.model)), method


def test_every_method_of_the_host_is_named_or_left_out_with_a_reason():
    assert set(host.ALG_DICT) <= {*algorithms.COMPARABLE, *algorithms._LEFT_OUT}
    for method, reason in algorithms._LEFT_OUT.items():
        with pytest.raises(host.HostError, match=f"editing_method is {method!r}, which {reason}; allowed: KDPO, FT"):
            algorithms.hyper_params_class(method)


@pytest.mark.skipif(on_main(), reason="main has it")
def test_what_the_release_lacks_is_told_with_the_host_that_has_it():
    with pytest.raises(host.HostError, match=r"EasyEdit's release does not have, but its GitHub main branch does$"):
        algorithms.hyper_params_class("WISE")


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
def test_a_projection_is_made_for_the_covariance_at_hand_and_kept_with_the_statistics(small_world, requests, fresh, tmp_path):
    """Not where the process stands, not one of another layer, and not remade for the same."""
    hparams = load_hparams("AlphaEdit", "world")
    hparams.model_name, hparams.stats_dir = fresh, str(tmp_path / "stats")
    shutil.copytree(small_world.statistics, tmp_path / "stats", ignore=shutil.ignore_patterns("projections"))
    files = []
    for layer in (0, 1, 0):
        algorithms.set_memory()
        hparams.layers = [layer]
        editor = host.BaseEditor(copy.copy(hparams))
        algorithms.undo_edits(editor, algorithms.apply_edit(editor, editor.model, requests[0])[1])
        projection = importlib.import_module("easyeditor.models.alphaedit.AlphaEdit_main").P[0]
        torch.testing.assert_close(projection @ projection, projection, rtol=1e-3, atol=1e-4)
        files.append(set((tmp_path / "stats" / "projections").iterdir()))
    assert len(files[0]) == 1 and len(files[1]) == 2 and files[1] == files[2]
    assert all(file.suffix == ".safetensors" for file in files[2])
    assert not list(tmp_path.rglob("*.pt")) and not list(Path.cwd().glob("*.pt"))


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
def test_prompts_of_a_wrapper_are_measured_as_if_each_were_alone(small_world, requests, fresh):
    """GRACE's key is the prompt's last token, wherever the last edit had it."""
    hparams = load_hparams("GRACE", "world")
    hparams.model_name = fresh
    hparams.sequential_edit = True
    editor = host.BaseEditor(hparams)
    model = algorithms.model_to_edit(editor, editor.model)
    lengths = set()
    for request in requests[:4]:
        model, _ = algorithms.apply_edit(editor, model, request)
        lengths.add(len(editor.tok(request["prompt"])["input_ids"]))
    assert len(lengths) > 1
    for request in requests[:4]:
        assert edit_quality(editor, model, request, fluency=False)["rewrite_acc"] == [1.0]


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
def test_grace_learns_an_edit_that_an_earlier_value_serves(requests, fresh):
    hparams = load_hparams("GRACE", "world")
    hparams.model_name, hparams.sequential_edit = fresh, True
    editor = host.BaseEditor(hparams)
    model, losses = algorithms.model_to_edit(editor, editor.model), []
    for n_iter in (1, 20, 1):
        editor.hparams.n_iter = n_iter
        model, _ = algorithms.apply_edit(editor, model, requests[0])
        losses.append(float(model.losses[0]))
    (adapter,) = (module for module in model.modules() if hasattr(module, "epsilons"))
    assert len(adapter.keys) == 1 and losses[2] < losses[1] / 2


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
@pytest.mark.parametrize("method", ["LoRA", "DPO"])
def test_an_adapter_goes_on_from_edit_to_edit_and_is_used_without_dropout(requests, fresh, method):
    pytest.importorskip("peft")
    hparams = load_hparams(method, "world")
    hparams.model_name, hparams.lora_dropout, hparams.num_steps = fresh, 0.5, 2
    editor = host.BaseEditor(hparams)
    model, adapters = algorithms.model_to_edit(editor, editor.model), []
    for request in requests[:2]:
        model, _ = algorithms.apply_edit(editor, model, request)
        assert not any(module.training for module in model.modules())
        adapters.append({name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad})
        editor.hparams.lr = 0.0
    assert any(weight.any() for name, weight in adapters[0].items() if "lora_B" in name)
    assert same_state(*adapters)


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
def test_what_methods_want_beside_the_request(requests, fresh):
    hparams = load_hparams("FT", "world")
    hparams.model_name = fresh
    editor = host.BaseEditor(hparams)
    for request in requests[:5]:
        length = len(editor.tok(f" {request['target_new']}")["input_ids"])
        says = editor.tok.decode(editor.tok(f" {request['ground_truth']}.")["input_ids"][:length]).strip()
        expected = {"DPO": {"target_neg": says}, "PMET": {"target_new": f" {request['target_new']}"}, "FT": {}}
        for editor.hparams.alg_name, wanted in expected.items():
            assert algorithms._wanted_beside(editor, editor.model, request) == wanted
    editor.hparams.alg_name = "WISE"
    texts = {algorithms._wanted_beside(editor, editor.model, request)["loc_prompt"] for request in requests[:5]}
    assert len(texts) > 1
    for text in texts:
        assert 0 < len(editor.tok(text)["input_ids"]) < 15 and text not in str(requests)


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
def test_what_wise_cannot_do_is_told(requests, fresh):
    hparams = load_hparams("WISE", "world")
    hparams.save_freq, hparams.merge_freq = 2, 3
    with pytest.raises(host.HostError, match="merge_freq is 3; allowed: a multiple of save_freq, 2"):
        algorithms.check_method(hparams, sequential=True)
    hparams.model_name, hparams.n_iter, hparams.sequential_edit = fresh, 1, True
    editor = host.BaseEditor(hparams)
    model, _ = algorithms.apply_edit(editor, algorithms.model_to_edit(editor, editor.model), requests[0])
    with pytest.raises(host.HostError, match="save_freq is 2, and that many edits are made"):
        algorithms.apply_edit(editor, model, requests[1])


def test_lora_learns_all_of_an_answer(requests, fresh):
    """The first token, too, where the tokenizer pads with its end token."""
    pytest.importorskip("peft")
    hparams = load_hparams("LoRA", "gpt2-xl")
    hparams.model_name, hparams.device = fresh, "cpu"
    editor = host.BaseEditor(hparams)
    assert editor.tok.pad_token_id == editor.tok.eos_token_id
    model, _ = algorithms.apply_edit(editor, algorithms.model_to_edit(editor, editor.model), requests[0])
    assert edit_quality(editor, model, requests[0], fluency=False)["rewrite_acc"] == [1.0]
