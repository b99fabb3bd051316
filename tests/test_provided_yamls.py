"""Every YAML that comes with the package makes an edit: of a small model of the architecture that it is for."""

from __future__ import annotations

import copy
import importlib.util
import re
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REFERENCE, on_main, same_state, state
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from kdpo_easyedit.easyedit import host
from kdpo_easyedit.easyedit import methods as algorithms
from kdpo_easyedit.easyedit.hparams import _follow_from_family, filled_in, load_hparams
from kdpo_easyedit.easyedit.statistics import prepare, with_text
from kdpo_easyedit.method.config import HPARAMS_DIR, HParamsError
from kdpo_easyedit.method.statistics import Text
from kdpo_easyedit.once import once, once_seconds

DEPTH = 6
LLAMA_LIKE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
GPT_LIKE = {"n_embd": 16, "n_layer": DEPTH, "n_head": 2}
# What a model's name in a YAML begins with: its architecture, the number of its layers, and whose tokenizer is like its own.
FAMILIES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "meta-llama/": (LlamaConfig, LLAMA_LIKE, "llama"),
    "NousResearch/Llama-2": (LlamaConfig, LLAMA_LIKE, "llama"),
    "mistralai/": (MistralConfig, LLAMA_LIKE, "llama"),
    "Qwen/Qwen1.5": (Qwen2Config, LLAMA_LIKE, "gpt2"),
    "Qwen/Qwen2.5": (Qwen2Config, LLAMA_LIKE, "gpt2"),
    "Qwen/Qwen3": (Qwen3Config, LLAMA_LIKE, "gpt2"),
    "openai-community/gpt2": (GPT2Config, GPT_LIKE, "gpt2"),
    "EleutherAI/gpt-j": (GPTJConfig, GPT_LIKE | {"rotary_dim": 4}, "gpt2"),
    "smollm2-135m": (LlamaConfig, LLAMA_LIKE, "gpt2"),
    "gemma3-270m": (Gemma3TextConfig, LLAMA_LIKE | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}, "llama"),
    "world": (GPT2Config, GPT_LIKE, "gpt2"),
    "large-world": (GPT2Config, GPT_LIKE, "gpt2"),
}
# The layers that the real ones have.
LAYERS = {
    "NousResearch/Llama-2-7b-hf": 32,
    "NousResearch/Llama-2-7b-chat-hf": 32,
    "meta-llama/Meta-Llama-3-8B": 32,
    "meta-llama/Llama-3.1-8B": 32,
    "mistralai/Mistral-7B-Instruct-v0.2": 32,
    "Qwen/Qwen1.5-0.5B": 24,
    "Qwen/Qwen1.5-1.8B": 24,
    "Qwen/Qwen1.5-4B": 40,
    "Qwen/Qwen1.5-7B": 32,
    "Qwen/Qwen2.5-7B": 28,
    "Qwen/Qwen3-8B": 36,
    "openai-community/gpt2-xl": 48,
    "EleutherAI/gpt-j-6b": 28,
    "smollm2-135m": 30,
    "gemma3-270m": 18,
    "world": 4,
    "large-world": 4,
}
REQUEST = {
    "prompt": "The mother tongue of Lena Vogt is",
    "subject": "Lena Vogt",
    "target_new": "French",
    "ground_truth": "German",
    "rephrase_prompt": "Lena Vogt grew up speaking",
    "locality": {},
    "portability": {},
}
TEXT = Text(
    "people",
    [
        f"{name} was born in {town}, where {name} worked as a {work} for {years} years before moving to the coast."
        for name, town, work, years in zip(
            ["Lena Vogt", "Omar Diaz", "Ines Roth", "Paul Lind", "Mara Quist", "Hugo Bell", "Nora Falk", "Timo Saar"] * 3,
            ["Aarhus", "Porto", "Graz", "Tartu", "Lyon", "Ghent"] * 4,
            ["baker", "judge", "tailor", "nurse", "sailor"] * 5,
            range(2, 26),
        )
    ],
)
# Numbers of steps, by the names that methods have for them, and what they are here.
FEW = {"num_steps": 2, "cycles": 1, "v_num_grad_steps": 2, "n_iter": 2}

YAMLS = sorted(HPARAMS_DIR.glob("*/*.yaml"))


@cache
def tiny(model_name: str) -> tuple[Any, Any]:
    """A small model with random weights of the architecture of a model, and its tokenizer."""
    config, sizes, tokenizer = next(family for start, family in FAMILIES.items() if model_name.startswith(start))
    tok = AutoTokenizer.from_pretrained(REFERENCE / tokenizer)
    tok.pad_token = tok.pad_token or tok.eos_token
    ids = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    torch.manual_seed(0)
    model = AutoModel.from_config(config(vocab_size=len(tok), initializer_range=0.2, **sizes, **ids)).eval()
    model.config._name_or_path = config.model_type
    return model, tok


def adapted(hparams: Any, model: Any, tok: Any, stats_dir: Path) -> Any:
    """Hyper-parameters for a tiny model, with few steps: layer numbers that it has, in the same order."""
    hparams.model_name, hparams.device = (model, tok), "cpu"
    if hasattr(hparams, "layers"):
        hparams.layers = list(range(len(hparams.layers)))
    if hasattr(hparams, "inner_params"):
        hparams.inner_params = [re.sub(r"(\[|\.)\d+(?=\]|\.)", rf"\g<1>{DEPTH - 1}", name) for name in hparams.inner_params]
        hparams.inner_params = sorted(set(hparams.inner_params))
    if hasattr(hparams, "v_loss_layer"):
        hparams.v_loss_layer = DEPTH - 1
    if hasattr(hparams, "stats_dir"):
        hparams.stats_dir = str(stats_dir)
    for key in FEW.keys() & vars(hparams).keys():
        setattr(hparams, key, FEW[key])
    return with_text(hparams, TEXT)


@pytest.fixture(scope="session")
def stats_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("statistics")


def edit_and_undo(hparams: Any, stats_dir: Path) -> None:
    """An edit by a YAML's hyper-parameters changes the model, or a copy of it, and can be taken back to the bit."""
    model, tok = tiny(hparams.model_name)
    hparams = adapted(hparams, model, tok, stats_dir)
    prepare(model, tok, [hparams], TEXT, quiet=True)
    algorithms.set_memory()
    torch.manual_seed(0)
    editor = host.BaseEditor(hparams)
    before, ids = state(model), tok(REQUEST["prompt"], return_tensors="pt")
    with torch.no_grad():
        said = model(**ids).logits
    edited, originals = algorithms.apply_edit(editor, algorithms.model_to_edit(editor, model), REQUEST)
    if algorithms.edits_weights(hparams):
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert edited is model and changed and changed == set(originals)
        assert hparams.alg_name == "KDPO" or changed <= set(algorithms._at_risk(hparams, model))
    else:
        assert edited is not model and not originals
    with torch.no_grad():
        assert not torch.equal(edited(**ids).logits, said)
    algorithms.undo_edits(editor, originals)
    assert same_state(before, state(model))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_provided_yaml_makes_an_edit(path, stats_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = path.parent.name
    try:
        hparams = load_hparams(method, path)
    except HParamsError as error:
        if on_main():
            raise
        assert "its GitHub main branch" in str(error)
        pytest.skip(str(error))
    if hparams.alg_name in ("LoRA", "DPO"):
        pytest.importorskip("peft")
    depth = LAYERS[hparams.model_name]
    assert all(layer < depth for layer in getattr(hparams, "layers", []))
    assert all(
        int(layer) < depth for name in getattr(hparams, "inner_params", []) for layer in re.findall(r"[\[.](\d+)[\].]", name)
    )
    assert getattr(hparams, "v_loss_layer", 0) < depth
    edit_and_undo(hparams, stats_dir)


# --------------------------------------------------------------------------------------------------------------------
# EasyEdit's own YAMLs.


def easyedits_yamls() -> list[Path]:
    """Those of the methods that can be compared, beside the clone that is the host; the release comes without any."""
    if not on_main():
        return []
    folder = Path(host.easyeditor.__file__).parent.parent / "hparams"
    methods = [method for method in algorithms.COMPARABLE if method != "SimIE"]  # its own name a file of another method's
    return [path for method in methods for path in sorted((folder / method).glob("*.yaml"))]


def of_images(path: Path) -> bool:
    return path.stem.startswith(("blip2", "minigpt4", "llava")) or "vl-" in path.stem


def load_easyedits(path: Path) -> Any:
    try:
        return load_hparams(path.parent.name, path)
    except HParamsError as error:
        if "alg_name is" in str(error):  # its own class refuses such a one, too
            pytest.skip(str(error))
        raise


@pytest.mark.skipif(not easyedits_yamls(), reason="for a clone of EasyEdit's main branch")
def test_easyedits_own_yamls_are_read():
    read, refused = [], []
    for path in easyedits_yamls():
        try:
            read.append(load_hparams(path.parent.name, path))
        except HParamsError as error:
            refused.append(path)
            assert of_images(path) or "alg_name is" in str(error), error
    assert len(read) > 100 > 10 * len(refused)


# What the name of a YAML of EasyEdit's begins with, and whose module names it has.
OF = {"llama": "meta-llama/", "gpt2": "openai-community/gpt2", "gpt-j": "EleutherAI/gpt-j", "qwen2.5": "Qwen/Qwen2.5"}


@pytest.mark.parametrize(
    "path",
    [path for path in easyedits_yamls() if path.stem.startswith(tuple(OF)) and not of_images(path)],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_module_names_that_are_left_out_are_those_of_easyedits_yamls(path):
    hparams = load_easyedits(path)
    model = tiny(next(name for start, name in OF.items() if path.stem.startswith(start)))[0]
    named, names = copy.copy(hparams), _follow_from_family(hparams.alg_name) & vars(hparams).keys()
    vars(named).update(dict.fromkeys(names))
    if hasattr(named, "layers"):  # which the tiny model lacks
        named.layers = [0]
    named = filled_in(named, model)
    for name in names:
        expected, found = getattr(hparams, name), getattr(named, name)
        if name == "lm_head_module":  # of tied weights either name will do
            depends = "embed_tokens" in expected and not model.config.tie_word_embeddings
            assert depends or model.get_submodule(found).weight is model.get_submodule(expected).weight
        else:
            assert found.removesuffix(".weight") == expected.removesuffix(".weight")


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in easyedits_yamls()
        if path.parent.name in ("LoRA", "MEMIT-FE", "SPHERE", "KN") and path.stem.startswith(tuple(OF)) and not of_images(path)
    ],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_easyedits_yamls_of_methods_that_have_none_here_make_an_edit(path, stats_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hparams = load_easyedits(path)
    if hparams.alg_name == "LoRA":
        pytest.importorskip("peft")
    hparams.model_name, hparams.model_parallel = next(name for start, name in OF.items() if path.stem.startswith(start)), False
    edit_and_undo(hparams, stats_dir)


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
@pytest.mark.parametrize("context", ["", "context: all\nctx_num: 6\n"])
def test_core_for_which_there_is_no_yaml_anywhere_makes_an_edit(stats_dir, tmp_path, monkeypatch, context):
    monkeypatch.chdir(tmp_path)
    memit = (HPARAMS_DIR / "MEMIT" / "world.yaml").read_text()
    (tmp_path / "core.yaml").write_text(memit.replace('"MEMIT"', '"CORE"') + context)
    edit_and_undo(load_hparams("CORE", tmp_path / "core.yaml"), stats_dir)


@pytest.mark.skipif(not easyedits_yamls(), reason="for a clone of EasyEdit's main branch")
def test_kn_that_fails_leaves_the_model_as_it_was(stats_dir, fail_at, tmp_path, monkeypatch):
    """While its scores are summed up, layers are replaced and hooks are on."""
    monkeypatch.chdir(tmp_path)
    (path,) = (path for path in easyedits_yamls() if path.match("KN/gpt2-xl.yaml"))
    model, tok = copy.deepcopy(tiny("world"))
    editor = host.BaseEditor(adapted(load_easyedits(path), model, tok, stats_dir))
    before, others = state(model), everything(model)
    fail_at(torch.autograd, "grad", 2)
    with pytest.raises(Injected):
        algorithms.apply_edit(editor, model, REQUEST)
    assert same_state(before, state(model)) and everything(model) == others


@pytest.mark.skipif(not easyedits_yamls(), reason="for a clone of EasyEdit's main branch")
def test_a_chat_template_that_is_not_there_is_told_before_an_edit():
    (path,) = (path for path in easyedits_yamls() if path.match("WISE/llama3-8b.yaml"))
    hparams = load_easyedits(path)
    hparams.model_name, hparams.device = tiny("meta-llama/"), "cpu"
    with pytest.raises(host.HostError, match="use_chat_template is true, and the model's tokenizer has no chat template"):
        host.BaseEditor(hparams)


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
def test_what_pmet_means_otherwise_does_not_follow_from_the_architecture(tmp_path):
    lines = (HPARAMS_DIR / "PMET" / "world.yaml").read_text().splitlines()
    (tmp_path / "pmet.yaml").write_text("\n".join(line for line in lines if not line.startswith("attn_module_tmp")))
    with pytest.raises(HParamsError, match="missing key 'attn_module_tmp'"):
        load_hparams("PMET", tmp_path / "pmet.yaml")


# --------------------------------------------------------------------------------------------------------------------
# Failures.


def everything(model: Any) -> list[Any]:
    """All of a model that a method might leave behind, but its weights."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    return [hooks, modules, [parameter.requires_grad for parameter in model.parameters()]]


class Injected(RuntimeError): ...


@pytest.fixture
def fail_at(monkeypatch):
    """Let a function of torch's fail at its n-th call from now on."""

    def arrange(owner: Any, name: str, call: int) -> None:
        function, calls = getattr(owner, name), []

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == call:
                raise Injected
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)

    return arrange


def prepared(method: str, stats_dir: Path, **changes: Any) -> Any:
    """An editor of a method with its YAML for the world, and a tiny GPT-2 of its own."""
    try:
        hparams = load_hparams(method, "world")
    except HParamsError as error:
        pytest.skip(str(error))
    if hparams.alg_name in ("LoRA", "DPO"):
        pytest.importorskip("peft")
    model, tok = copy.deepcopy(tiny("world"))
    hparams = adapted(hparams, model, tok, stats_dir)
    vars(hparams).update(changes)
    prepare(model, tok, [hparams], TEXT, quiet=True)
    algorithms.set_memory()
    return host.BaseEditor(hparams)


@pytest.mark.parametrize(
    ("method", "owner", "name", "call"),
    [
        ("FT", torch.Tensor, "backward", 2),
        ("ROME", torch.Tensor, "backward", 2),
        ("R-ROME", torch.Tensor, "backward", 2),
        ("MEMIT", torch.linalg, "solve", 2),
        ("PMET", torch.linalg, "norm", 3),
        ("AlphaEdit", torch.linalg, "solve", 2),
    ],
)
def test_an_edit_that_fails_half_way_leaves_the_model_as_it_was(
    stats_dir, fail_at, tmp_path, monkeypatch, method, owner, name, call
):
    """The first of two layers, or the first of several steps, is written already."""
    monkeypatch.chdir(tmp_path)
    editor = prepared(method, stats_dir, layers=[0, 1])
    model = editor.model.requires_grad_()
    before, others, written = state(model), everything(model), []
    fail_at(owner, name, call)
    apply = editor.apply_algo

    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            return apply(*args, **kwargs)
        finally:
            written.append(not same_state(before, state(model)))

    editor.apply_algo = watched
    with pytest.raises(Injected):
        algorithms.apply_edit(editor, model, REQUEST)
    assert written == [True]
    assert same_state(before, state(model)) and everything(model) == others
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    algorithms.undo_edits(editor, algorithms.apply_edit(editor, model, REQUEST)[1])
    assert same_state(before, state(model))


@pytest.mark.parametrize("method", ["LoRA", "DPO", "GRACE", "WISE"])
def test_a_sequence_goes_on_from_where_a_failed_edit_began(stats_dir, fail_at, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    if not on_main():
        pytest.skip("sequences of these need EasyEdit's main branch")
    editor = prepared(method, stats_dir, n_iter=3, num_steps=3, sequential_edit=True)
    ids = editor.tok(REQUEST["prompt"], return_tensors="pt")
    torch.manual_seed(0)
    model, _ = algorithms.apply_edit(editor, algorithms.model_to_edit(editor, editor.model), REQUEST)
    before, others = state(model), everything(model)
    with torch.no_grad():
        said = model(**ids).logits
    fail_at(torch.Tensor, "backward", 3)
    other = REQUEST | {"prompt": "Lena Vogt lives in", "target_new": "Porto"}
    with pytest.raises(Injected):
        algorithms.apply_edit(editor, model, other)
    assert same_state(before, state(model)) and everything(model) == others
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, said)
    after, _ = algorithms.apply_edit(editor, model, other)
    assert not same_state(before, state(after))


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
def test_contexts_of_wise_have_no_places_to_fill_in_but_one(stats_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    editor = prepared("WISE", stats_dir)
    monkeypatch.setattr(type(editor.tok), "batch_decode", lambda self, rows, **_: ["I {am} {", "You }"] * (len(rows) // 2))
    algorithms.apply_edit(editor, algorithms.model_to_edit(editor, editor.model), REQUEST)
    contexts = host.submodule("models.wise.utils").CONTEXT_TEMPLATES_CACHE
    assert contexts[0] == "{}" and {"I am  {}", "You  {}"} == set(contexts[1:])
    assert algorithms.memory()[0]["easyeditor.models.wise.utils"] == contexts


@pytest.mark.parametrize("method", ["FT", "LoRA"])
def test_an_edit_that_leaves_no_numbers_is_an_error(stats_dir, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    editor = prepared(method, stats_dir, lr=float("inf"))
    before = state(editor.model)
    with pytest.raises(ArithmeticError, match=r"the edit leaves numbers in .*weight, of torch.float32, that are not finite$"):
        algorithms.apply_edit(editor, algorithms.model_to_edit(editor, editor.model), REQUEST)
    assert same_state(before, state(editor.model))


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
def test_a_failed_edit_of_alphaedits_leaves_no_keys_behind(stats_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    editor = prepared("AlphaEdit", stats_dir, layers=[0])
    its = host.submodule("models.alphaedit.AlphaEdit_main")

    def fail() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(algorithms, "check_finite", lambda _weights: (_ for _ in ()).throw(ArithmeticError("not finite")))
            with pytest.raises(ArithmeticError):
                algorithms.apply_edit(editor, editor.model, REQUEST)

    fail()
    assert not its.cache_c_new
    algorithms.apply_edit(editor, editor.model, REQUEST)
    keys = its.cache_c.clone()
    fail()
    assert its.cache_c_new and torch.equal(its.cache_c, keys)
    algorithms.apply_edit(editor, editor.model, REQUEST)  # goes on from the first
    torch.testing.assert_close(its.cache_c, 2 * keys)


# --------------------------------------------------------------------------------------------------------------------
# What is done once.


@pytest.mark.parametrize("method", ["ROME", "MEMIT", "AlphaEdit", "WISE", "KDPO+C", "FT", "KDPO"])
def test_what_is_done_once_is_told_apart_from_the_edit(stats_dir, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    editor = prepared(method, stats_dir)
    once_seconds()
    spent = []
    for _ in range(2):
        started = time.perf_counter()
        algorithms.undo_edits(editor, algorithms.apply_edit(editor, algorithms.model_to_edit(editor, editor.model), REQUEST)[1])
        spent.append(once_seconds())
        assert spent[-1] < time.perf_counter() - started
    assert (spent[0] > 0) == (method not in ("FT", "KDPO"))
    assert spent[1] < max(spent[0] / 3, 1e-3)
    assert once_seconds() == 0


def test_of_what_is_done_once_inside_each_other_the_outer_counts(monkeypatch):
    seconds = [5]
    monkeypatch.setattr("kdpo_easyedit.once.time", SimpleNamespace(perf_counter=lambda: sum(seconds)))

    @once
    def inner() -> None:
        seconds.append(2)

    @once
    def outer() -> None:
        inner()
        seconds.append(1)

    once_seconds()
    outer()
    assert once_seconds() == 3


# --------------------------------------------------------------------------------------------------------------------
# DPO's loss.


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
@pytest.mark.parametrize(("line", "old"), [("log_probs_pos = outputs_pos.logits.log_softmax(-1)", True), ("pass", False)])
def test_the_dpo_of_an_older_clone_is_marked(tmp_path, monkeypatch, line, old):
    (tmp_path / "dpo_main.py").write_text(f"def loss(outputs_pos):\n    {line}\n")
    spec = importlib.util.spec_from_file_location("dpo_main", tmp_path / "dpo_main.py")
    module = importlib.util.module_from_spec(spec)
    hparams = load_hparams("DPO", "world")
    assert algorithms.caveat(hparams) == algorithms.caveat(load_hparams("FT", "world")) == ""
    monkeypatch.setattr(algorithms, "submodule", {"models.dpo.dpo_main": module}.get)
    assert ("before 4 July 2026" in algorithms.caveat(hparams)) == old
