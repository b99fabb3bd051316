"""Reading hyper-parameters: what is understood, and that every mistake gets one clear error."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import on_main

from kdpo_easyedit import HParamsError, KDPOHyperParams
from kdpo_easyedit.cli.flags import add_machine, add_methods, load_methods
from kdpo_easyedit.devices import DTYPES
from kdpo_easyedit.easyedit.hparams import filled_in, load_hparams
from kdpo_easyedit.easyedit.loading import load_model
from kdpo_easyedit.method.config import HPARAMS_DIR, find_hparams, loading_dtype, read_yaml

RELEASED = {  # the design's table: layer, lr, num_steps, cycles, stop_crit
    "gpt-j-6b": (21, 1e-4, 8, 20, 1e-3),
    "llama-2-7b": (21, 1e-4, 8, 20, 1e-3),
    "llama-2-7b-chat": (21, 5e-4, 5, 10, False),
    "llama-3-8b": (21, 1e-4, 8, 20, 1e-3),
    "mistral-7b-instruct": (21, 2e-4, 8, 10, 2e-4),
    "qwen1.5-0.5b": (21, 1e-4, 8, 20, 1e-3),
    "qwen1.5-1.8b": (18, 1e-4, 8, 20, 1e-3),
    "qwen1.5-4b": (31, 1e-4, 8, 20, 1e-3),
    "qwen1.5-7b": (21, 1e-4, 8, 20, 1e-5),
}
RELEASE_YAML = {  # the layout of the paper's release
    "alg_name": "KDPO",
    "model_name": "NousResearch/Llama-2-7b-hf",
    "device": 0,
    "layers": [21],
    "num_steps": 8,
    "batch_size": 1,
    "cycles": 20,
    "max_length": 40,
    "lr": "1e-4",
    "stop_crit": "1e-3",
    "weight_decay": 0,
    "kl_factor": 0,
    "norm_constraint": False,
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
    "model_parallel": False,
    "nll_term": False,
    "mask_where_equal": True,
    "lora": False,
    "unused_params": False,
    "reg_dpo": False,
}


def written(tmp_path: Path, config: dict, name: str = "some.yaml") -> Path:
    path = tmp_path / name
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def config() -> dict:
    return {"alg_name": "KDPO", "model_name": "world", "device": "cpu", "layers": [2]}


def test_defaults_are_the_papers(config):
    hparams = KDPOHyperParams(**config)
    assert (hparams.num_steps, hparams.cycles, hparams.lr, hparams.beta, hparams.stop_crit) == (8, 20, 1e-4, 0.1, 1e-3)
    assert (hparams.weight_decay, hparams.norm_constraint) == (0, False)
    assert (hparams.negatives, hparams.online) == ("teacher_forced", True)
    assert (hparams.margin, hparams.contexts, hparams.positions) == (False, 0, "all")
    assert (hparams.sequential_edit, hparams.sequential_lr_scale, hparams.update_scale) == (None, 0.2, 1.0)
    assert (hparams.batch_size, hparams.max_length, hparams.model_parallel, hparams.fp16) == (1, 40, False, False)


@pytest.mark.parametrize("name", RELEASED)
def test_released_settings(name):
    hparams = KDPOHyperParams.from_hparams(name)
    layer, *rest = RELEASED[name]
    assert hparams.layers == [layer]
    assert [hparams.lr, hparams.num_steps, hparams.cycles, hparams.stop_crit] == rest


def test_a_path_needs_no_ending_and_a_name_no_folder(config, tmp_path, monkeypatch):
    path = written(tmp_path, config | {"lr": 3e-4})
    assert KDPOHyperParams.from_hparams(path).lr == 3e-4
    assert KDPOHyperParams.from_hparams(str(path.with_suffix(""))).lr == 3e-4
    monkeypatch.chdir(tmp_path)
    assert KDPOHyperParams.from_hparams("some").lr == 3e-4
    assert KDPOHyperParams.from_hparams("qwen1.5-0.5b").model_name == "Qwen/Qwen1.5-0.5B"


def test_a_folder_of_ones_own_is_looked_through_by_method(config, tmp_path, monkeypatch):
    (tmp_path / "mine" / "KDPO").mkdir(parents=True)
    file = tmp_path / "mine" / "KDPO" / "small.yaml"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    assert find_hparams("KDPO", "mine/small").resolve() == find_hparams("KDPO", tmp_path / "mine" / "small.yaml") == file
    with pytest.raises(HParamsError, match="no hyper-parameters for FT at 'mine/small'"):
        find_hparams("FT", "mine/small")


def test_a_name_that_is_not_provided_lists_those_that_are():
    with pytest.raises(HParamsError, match=r"qwen1\.6.*qwen1\.5-0\.5b"):
        KDPOHyperParams.from_hparams("qwen1.6")


@pytest.mark.parametrize("path", sorted(HPARAMS_DIR.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_provided_yaml_loads(path):
    method = path.parent.name
    if not on_main() and (method not in HERE_ON_RELEASE or 'lora_type: "lora"' in path.read_text()):
        with pytest.raises(HParamsError, match=r"GitHub main branch (has both|does)"):
            load_hparams(method, path)
        return
    hparams = load_hparams(method, path)
    assert hparams.alg_name == method.removesuffix("-M").removesuffix("+C")
    numbers = [getattr(hparams, key, 0.0) for key in ("lr", "v_lr", "edit_lr", "L2")]
    assert all(isinstance(number, (int, float)) for number in numbers)
    assert method == "Retrieval" or getattr(hparams, "layers", None) is not None or hparams.inner_params


HERE_ON_RELEASE = ("KDPO", "KDPO+C", "FT", "ROME", "MEMIT", "LoRA", "Retrieval")


@pytest.mark.skipif(not on_main(), reason="WISE is for EasyEdit's main branch")
def test_a_yaml_of_easyedits_for_wise_is_understood(tmp_path):
    config = yaml.safe_load((HPARAMS_DIR / "WISE" / "world.yaml").read_text())
    margins = [config.pop(key) for key in ("alpha", "beta", "gamma")]
    hparams = load_hparams("WISE", written(tmp_path, config | {"act_margin": margins}))
    assert [hparams.alpha, hparams.beta, hparams.gamma] == margins
    for wrong in (margins[:2], 5.0):
        with pytest.raises(HParamsError, match="unknown key 'act_margin'"):
            load_hparams("WISE", written(tmp_path, config | {"act_margin": wrong}))


@pytest.mark.skipif(not on_main(), reason="EAMET is for EasyEdit's main branch")
def test_one_weight_of_eamet_is_every_layers(tmp_path):
    config = yaml.safe_load((HPARAMS_DIR / "EAMET" / "smollm2-135m.yaml").read_text())
    for weight, weights in ((50, [50, 50]), ([10, 20.0], [10, 20.0])):
        hparams = load_hparams("EAMET", written(tmp_path, config | {"layers": [3, 4], "mom2_update_weight": weight}))
        assert hparams.mom2_update_weight == weights
    for wrong in ([10], ["10", 20], "many"):
        with pytest.raises(HParamsError, match=r"mom2_update_weight is .*; allowed: a number, or one for each of the 2 layers"):
            load_hparams("EAMET", written(tmp_path, config | {"layers": [3, 4], "mom2_update_weight": wrong}))
    with pytest.raises(HParamsError, match="layers is None; allowed: a list of different layer numbers"):
        load_hparams("EAMET", written(tmp_path, config | {"layers": None}))


def test_fine_tuning_has_its_two_names():
    assert find_hparams("FT-L", "world") == find_hparams("FT", "world") != find_hparams("FT-M", "llama-2-7b")


def test_a_yaml_of_the_release_is_understood(tmp_path):
    hparams = KDPOHyperParams.from_hparams(written(tmp_path, RELEASE_YAML))
    assert (hparams.lr, hparams.stop_crit, hparams.negatives) == (1e-4, 1e-3, "teacher_forced")
    ablation = RELEASE_YAML | {"reg_dpo": True, "mask_where_equal": False, "num_steps": 6, "cycles": 5}
    assert KDPOHyperParams.from_hparams(written(tmp_path, ablation)).negatives == "autoregressive"
    short = {key: value for key, value in RELEASE_YAML.items() if key not in ("stop_crit", "cycles")}
    hparams = KDPOHyperParams.from_hparams(written(tmp_path, short))
    assert (hparams.stop_crit, hparams.cycles) == (False, 1)  # what the release makes of their absence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unused_params": True}, "unused_params is True; allowed: False: it"),
        ({"nll_term": True}, "nll_term is True; allowed: False"),
        ({"lora": True}, "lora is True; allowed: False"),
        ({"kl_factor": 0.5}, "kl_factor is 0.5; allowed: 0"),
        ({"reg_dpo": "yes"}, "reg_dpo is 'yes'"),
        ({"reg_dpo": True}, "mask_where_equal is True with reg_dpo"),
        ({"negatives": "autoregressive"}, "reg_dpo is False but negatives is 'autoregressive'"),
    ],
)
def test_a_release_key_that_would_change_something_is_refused(tmp_path, change, message):
    path = written(tmp_path, RELEASE_YAML | change)
    with pytest.raises(HParamsError, match=message) as error:
        KDPOHyperParams.from_hparams(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": [2]}, r"unknown key 'layer' \(value \[2\]\); allowed keys: alg_name"),
        ({"alg_name": "FT"}, "alg_name is 'FT'; allowed: 'KDPO'"),
        ({"model_name": 3}, "model_name is 3; allowed: a model's name"),
        ({"device": "gpu"}, "device is 'gpu'; allowed: a CUDA device's number, or 'cpu'"),
        ({"layers": 2}, "layers is 2; allowed: a list"),
        ({"layers": []}, r"layers is \[\]; allowed: a list"),
        ({"layers": [2, 2]}, "layers is"),
        ({"layers": ["2"]}, "layers is"),
        ({"rewrite_module_tmp": "transformer.h.2"}, r"rewrite_module_tmp is .*; allowed: .*\{\}"),
        ({"layer_module_tmp": "transformer.h.{}}"}, r"layer_module_tmp is .*; allowed: .*\{\}"),
        ({"lr": "fast"}, "lr is 'fast'; allowed: a number above 0"),
        ({"lr": 0}, "lr is 0"),
        ({"lr": True}, "lr is True"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"num_steps": 2.5}, "num_steps is 2.5; allowed: a whole number"),
        ({"cycles": 0}, "cycles is 0"),
        ({"stop_crit": "none"}, "stop_crit is 'none'; allowed: a number above 0, or false"),
        ({"norm_constraint": True}, "norm_constraint is True"),
        ({"weight_decay": -1}, "weight_decay is -1; allowed: a number, 0 or above"),
        ({"negatives": "online"}, "negatives is 'online'; allowed: 'teacher_forced' or 'autoregressive'"),
        ({"sequential_edit": "no"}, "sequential_edit is 'no'; allowed: true or false"),
        ({"batch_size": 0}, "batch_size is 0; allowed: a whole number, 1 or above"),
    ],
)
def test_a_wrong_value_is_named_with_file_key_and_what_is_allowed(config, tmp_path, change, message):
    path = written(tmp_path, config | change)
    with pytest.raises(HParamsError, match=message) as error:
        KDPOHyperParams.from_hparams(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("key", ["alg_name", "model_name", "layers"])
def test_a_missing_key_is_named(config, tmp_path, key):
    del config[key]
    with pytest.raises(HParamsError, match=f"missing key '{key}'"):
        KDPOHyperParams.from_hparams(written(tmp_path, config))


@pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", "", "layers: [1"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(HParamsError, match=r"broken\.yaml: "):
        KDPOHyperParams.from_hparams(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [9]}, "layers holds 9; allowed: 0 to 3"),
        ({"layers": [1, 4]}, "layers holds 4; allowed: 0 to 3"),
        ({"rewrite_module_tmp": "transformer.h.{}.mlp.down_proj"}, "rewrite_module_tmp is .* matches nothing"),
        ({"rewrite_module_tmp": "transformer.h.{}.ln_1.weight"}, "whose weight is 1-dimensional"),
        ({"layer_module_tmp": "model.layers.{}"}, "layer_module_tmp is 'model.layers.{}', which matches nothing"),
        ({"mlp_module_tmp": "transformer.h.{}.ffn"}, "mlp_module_tmp is .* matches nothing"),
        ({"attn_module_tmp": "transformer.h.{}.attention"}, "attn_module_tmp is .* matches nothing"),
        ({"ln_f_module": "norm"}, "ln_f_module is 'norm', which matches nothing"),
        ({"lm_head_module": "{head}"}, "lm_head_module is '{head}', which matches nothing"),
        ({"lm_head_module": "head"}, "lm_head_module is 'head', which matches nothing"),
    ],
)
def test_what_the_model_does_not_have_is_named(config, loaded, change, message):
    with pytest.raises(HParamsError, match=message):
        KDPOHyperParams(**config | change).edited_parameters(loaded[0])


def test_the_ending_weight_may_be_left_out(config, loaded):
    with_it = config | {"rewrite_module_tmp": "transformer.h.{}.mlp.c_proj.weight"}
    names = [list(KDPOHyperParams(**c).edited_parameters(loaded[0])) for c in (config, with_it)]
    assert names == [["transformer.h.2.mlp.c_proj.weight"]] * 2


def test_other_methods_yamls_are_checked_too(tmp_path):
    good = yaml.safe_load((HPARAMS_DIR / "ROME" / "world.yaml").read_text())
    for config, message in (
        (good | {"v_learning_rate": 1}, "unknown key 'v_learning_rate'"),
        ({k: v for k, v in good.items() if k != "v_lr"}, "missing key 'v_lr'"),
        (good | {"alg_name": "MEMIT"}, "alg_name is 'MEMIT'; allowed for ROME: 'ROME'"),
        (good | {"layers": 0}, "layers is 0; allowed: a list of different layer numbers"),
        (good | {"layers": [-1]}, r"layers is \[-1\]; allowed: a list of different layer numbers"),
        (good | {"layers": []}, r"layers is \[\]; allowed: a list of different layer numbers"),
        (good | {"layers": [2, 2]}, r"layers is \[2, 2\]; allowed: a list of different layer numbers"),
        (good | {"v_lr": float("nan")}, "v_lr is nan; allowed: a number"),
        (good | {"v_lr": "inf"}, "v_lr is inf; allowed: a number"),
        (good | {"v_lr": True}, "v_lr is True; allowed: a number"),
        (good | {"mom2_adjustment": "False"}, "mom2_adjustment is 'False'; allowed: true, false"),
        (good | {"v_num_grad_steps": "ten"}, "v_num_grad_steps is 'ten'; allowed: a number"),
        (good | {"mom2_dtype": "float16"}, "mom2_dtype is 'float16'; allowed: float32, float64"),
        (
            good | {"rewrite_module_tmp": "h.{}}.mlp"},
            r"rewrite_module_tmp is 'h.\{\}\}.mlp'; allowed: a module's name with \{\}",
        ),
        (good | {"fact_token": "subject_lst"}, "fact_token is 'subject_lst'; allowed: last, subject_first, subject_last, "),
    ):
        with pytest.raises(HParamsError, match=message):
            load_hparams("ROME", written(tmp_path, config))


@pytest.mark.skipif(not on_main(), reason="for EasyEdit's main branch")
@pytest.mark.parametrize(
    ("method", "key", "wrong", "allowed"),
    [
        ("GRACE", "replacement", "replace_al", "replace_all, replace_last, replace_prompt"),
        ("GRACE", "eps_expand", "coverag", "coverage, moving_average"),
        ("GRACE", "val_init", "wam", "cold, warm"),
        ("GRACE", "val_train", "pert", "sgd, adv"),
        ("WISE", "objective_optimization", "only_lable", "only_label"),
        ("WISE", "merge_alg", "tie", "slerp, ties, magnitude_norm"),
        ("WISE", "densities", "many", "a number"),
        ("LoRA", "lora_type", "lorra", "lora, adalora"),
        ("SimIE", "solver", "lu", "LU, Cholesky, SVD"),
        ("FT", "norm_constraint", True, "a number, or false"),
    ],
)
def test_a_word_that_easyedit_does_not_know_is_named(method, key, wrong, allowed):
    with pytest.raises(HParamsError, match=f"world.yaml: {key} is {wrong!r}; allowed: {allowed}"):
        load_hparams(method, "world", {key: wrong})


def test_adapters_of_no_layers_are_those_of_all():
    if on_main():
        assert load_hparams("LoRA", "world", {"layers": []}).layers == []


def test_a_number_is_one_only_where_a_number_belongs(tmp_path):
    rome = yaml.safe_load((HPARAMS_DIR / "ROME" / "world.yaml").read_text())
    texts = {"device": "0", "mom2_dataset": "2021", "model_name": "1e5"}
    hparams = load_hparams("ROME", written(tmp_path, rome | texts | {"v_lr": "5e-1"}))
    assert {key: getattr(hparams, key) for key in texts} == texts and hparams.v_lr == 0.5
    for given, limit in ((1, 1.0), ("5e-4", 5e-4), (False, False)):
        found = load_hparams("FT", "world", {"norm_constraint": given}).norm_constraint
        assert found == limit and type(found) is type(limit)  # EasyEdit's FT takes a float alone for a limit


def test_an_override_goes_before_all_that_the_yaml_says(tmp_path):
    with pytest.raises(HParamsError, match="alg_name is 'MEMIT'; allowed for ROME: 'ROME'"):
        load_hparams("ROME", "world", {"alg_name": "MEMIT"})
    if on_main():
        config = yaml.safe_load((HPARAMS_DIR / "WISE" / "world.yaml").read_text())
        margins = [config.pop(key) for key in ("alpha", "beta", "gamma")]
        path = written(tmp_path, config | {"act_margin": margins})
        hparams = load_hparams("WISE", path, {"alpha": 99.0})
        assert [hparams.alpha, hparams.beta, hparams.gamma] == [99.0, *margins[1:]]
        hparams = load_hparams("WISE", "world", {"act_margin": [1.0, 2.0, 3.0]})
        assert [hparams.alpha, hparams.beta, hparams.gamma] == [1.0, 2.0, 3.0]


def test_a_layer_that_the_model_does_not_have_is_named_of_other_methods_too(tmp_path, loaded):
    good = yaml.safe_load((HPARAMS_DIR / "ROME" / "world.yaml").read_text())
    with pytest.raises(HParamsError, match="layers holds 9; allowed: 0 to 3"):
        filled_in(load_hparams("ROME", written(tmp_path, good | {"layers": [9]})), loaded[0])


def test_no_method_goes_by_the_name_of_another(tmp_path, config):
    path = written(tmp_path, config)
    assert not load_hparams("KDPO", path).mom2_adjustment
    with pytest.raises(HParamsError, match="mom2_adjustment is false; KDPO\\+C is KDPO with mom2_adjustment: true"):
        load_hparams("KDPO+C", path)
    with pytest.raises(HParamsError, match="mom2_adjustment is true, which makes it another method; name it KDPO\\+C"):
        load_hparams("KDPO", HPARAMS_DIR / "KDPO+C" / "world.yaml")
    with pytest.raises(HParamsError, match="objective_optimization is 'prompt_last'; FT-M is FT with 'target_new'"):
        load_hparams("FT-M", HPARAMS_DIR / "FT" / "world.yaml")


def test_a_method_that_cannot_be_compared_is_refused(tmp_path, config):
    with pytest.raises(HParamsError, match="editing_method is 'ROMA'; allowed: KDPO, FT"):
        load_hparams("ROMA", written(tmp_path, config))


@pytest.mark.parametrize("method", ["KDPO", "KDPO+C", "FT", "ROME", "MEMIT"])
@pytest.mark.parametrize(
    ("given", "dtype"),
    [({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16), ({"dtype": "float16"}, torch.float16)],
    ids=["left out", "bfloat16", "float16"],
)
def test_every_methods_yaml_says_what_the_model_is_loaded_in(method, given, dtype, tmp_path, small_world):
    config = yaml.safe_load(find_hparams(method, "world").read_text()) | {"model_name": str(small_world.folder)} | given
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    model, _ = load_model(load_hparams(method, tmp_path / "own.yaml"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_fp16_is_a_word_for_float16_and_a_contradiction_is_told(hparams, small_world, tmp_path):
    hparams = replace(hparams, fp16=True)
    assert load_model(hparams)[0].dtype == torch.float16
    assert load_model(replace(hparams, dtype="float16"))[0].dtype == torch.float16
    with pytest.raises(HParamsError, match="dtype is 'bfloat16' and fp16 is true, which means float16; leave one of them out"):
        replace(hparams, dtype="bfloat16")
    with pytest.raises(HParamsError, match="dtype is 'int8'; allowed: None or 'bfloat16' or 'float16' or 'float32'"):
        replace(hparams, dtype="int8")
    config = yaml.safe_load(find_hparams("FT", "world").read_text()) | {"dtype": "half"}
    (tmp_path / "ft.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(HParamsError, match=r"ft.yaml: dtype is 'half'; allowed: bfloat16, float16, float32"):
        load_hparams("FT", tmp_path / "ft.yaml")


def test_a_flag_goes_before_the_yaml(small_world, tmp_path):
    parser = argparse.ArgumentParser()
    add_methods(parser, "")
    add_machine(parser)
    config = yaml.safe_load(find_hparams("KDPO", "world").read_text()) | {"fp16": True}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    for flags, dtype in (([], torch.float16), *((["--dtype", name], getattr(torch, name)) for name in DTYPES)):
        options = parser.parse_args(["--hparams_dir", str(tmp_path / "own.yaml"), *flags])
        (method,) = load_methods(["KDPO"], options)
        assert loading_dtype(method.hparams) == dtype


def test_a_key_given_twice_is_told(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(find_hparams("KDPO", "world").read_text() + "margin: 3\n'margin': 6\n")
    with pytest.raises(HParamsError, match=r"own\.yaml: not a YAML file: the key 'margin' is given twice\n.* line "):
        load_hparams("KDPO", file)
    file.write_text("base: &base {lr: 1, layers: [1]}\nother: {<<: *base, lr: 2, 1: a, '1': b}\n")  # what is merged may change
    assert read_yaml(file)["other"] == {"lr": 2, "layers": [1], 1: "a", "1": "b"}
