"""The hyper-parameters of any of EasyEdit's methods, from a YAML."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args, get_origin

from ..method.config import (
    HParamsError,
    KDPOHyperParams,
    are_layers,
    check_keys,
    check_layers,
    find_hparams,
    is_template,
    loading_dtype,
    read_yaml,
)
from ..method.families import family_of, output_layer_of
from .host import IS_RELEASE, HostError
from .methods import RELEASE_BEHAVIOUR, hyper_params_class

# Fine-tuning goes by two names in the field: FT-L (objective_optimization: prompt_last), which is what both EasyEdits have
# and call FT, and FT-M (target_new). Both are the algorithm FT.
_ALGORITHMS = {"FT-L": "FT", "FT-M": "FT", "KDPO+C": "KDPO"}
_OBJECTIVES = {"FT-L": "prompt_last", "FT-M": "target_new"}
# The words that EasyEdit's code compares with; most others it takes without a word, and runs as something else. FT says itself
# what its objective_optimization cannot be.
_WORDS = {
    "fact_token": ("last", "subject_first", "subject_last", "subject_first_after_last"),
    "mom2_dtype": ("float32", "float64"),  # float16 holds no sums over a text
    "val_init": ("cold", "warm"),
    "val_train": ("sgd", "adv"),
    "replacement": ("replace_all", "replace_last", "replace_prompt"),
    "eps_expand": ("coverage", "moving_average"),
    "merge_alg": ("slerp", "ties", "magnitude_norm", "magnitude", "sign", "dare_ties", "dare_linear", "linear"),
    "lora_type": ("lora", "adalora"),
    "solver": ("LU", "Cholesky", "SVD"),
}
_WORDS_OF_WISE = {"objective_optimization": ("only_label",)}
# The methods for which no layers are all layers.
_OF_ALL_LAYERS = ("LoRA", "DPO")


def load_hparams(method: str, name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Any:
    """The hyper-parameters of any method, as EasyEdit's own class for it, from a YAML that :func:`find_hparams` finds.

    Args:
        overrides: keys whose values are these, whatever the YAML says.

    Raises:
        HParamsError: no such YAML, a method that this EasyEdit lacks, or a key that is unknown, missing or not for it.
    """
    algorithm = _ALGORITHMS.get(method, method)
    try:
        cls = hyper_params_class(algorithm)
    except HostError as error:
        raise HParamsError(str(error)) from None
    path = find_hparams(method, name_or_path)
    config = read_yaml(path)
    given = dict(overrides or {})
    if algorithm == "WISE":
        config, given = _margins_apart(config), _margins_apart(given)
    config |= given
    if config.get("alg_name") != algorithm:
        raise HParamsError(f"{path}: alg_name is {config.get('alg_name')!r}; allowed for {method}: {algorithm!r}")
    if cls is KDPOHyperParams:
        hparams = KDPOHyperParams.from_hparams(path, overrides)
        if method == "KDPO+C" and not hparams.mom2_adjustment:
            raise HParamsError(f"{path}: mom2_adjustment is false; KDPO+C is KDPO with mom2_adjustment: true")
        if method == "KDPO" and hparams.mom2_adjustment:
            raise HParamsError(f"{path}: mom2_adjustment is true, which makes it another method; name it KDPO+C")
        return hparams
    objective = _OBJECTIVES.get(method)
    if objective and config.get("objective_optimization", objective) != objective:
        raise HParamsError(
            f"{path}: objective_optimization is {config['objective_optimization']!r}; {method} is FT with {objective!r}"
        )
    dtype = config.pop("dtype", None)  # a key of ours, in every method's YAML
    try:
        if IS_RELEASE:
            _drop_keys_of_main(cls, config)
        left_out = [f.name for f in fields(cls) if f.name in _follow_from_family(algorithm) and f.name not in config]
        config |= dict.fromkeys(left_out)
        check_keys(cls, config)
        _read_numbers(cls, config)
        _check_values(cls, config)
        if algorithm == "EAMET":
            _one_a_layer(config)
        hparams = cls(**config)
        set_dtype(hparams, dtype)
    except HParamsError as error:
        raise HParamsError(f"{path}: {error}") from None
    return hparams


def _margins_apart(config: Mapping[str, Any]) -> dict[str, Any]:
    """WISE's margins, for which EasyEdit's YAMLs have one key, under the three that its class has."""
    margins = config.get("act_margin")
    if not isinstance(margins, list) or len(margins) != 3:
        return dict(config)
    others = {key: value for key, value in config.items() if key != "act_margin"}
    return others | dict(zip(("alpha", "beta", "gamma"), margins))


def _read_numbers(cls: type, config: dict[str, Any]) -> None:
    """Let numbers that YAML reads as text, such as 1e-4, be numbers; EasyEdit has a name or a device such as "0" be one, too.

    And let a norm_constraint be a float: another number is none to EasyEdit.
    """
    for f in fields(cls):
        value = config.get(f.name)
        if _holds_numbers(f) and isinstance(value, str):
            with suppress(ValueError):
                config[f.name] = float(value)
        elif f.name == "norm_constraint" and type(value) is int:
            config[f.name] = float(value)


def _holds_numbers(f: Field) -> bool:
    # A device may be text, whatever EasyEdit's annotation says.
    return f.name != "device" and not {int, float, "int", "float"}.isdisjoint(get_args(f.type) or (f.type,))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_values(cls: type, config: Mapping[str, Any]) -> None:
    """Whether layers and words are such that EasyEdit knows, and numbers and flags are where its annotations have some.

    Raises:
        HParamsError: one is not.
    """
    layers = config.get("layers", [0])
    if not are_layers(layers) or len(set(layers)) < len(layers) or not (layers or config["alg_name"] in _OF_ALL_LAYERS):
        raise HParamsError(f"layers is {layers!r}; allowed: a list of different layer numbers, counted from 0")
    for key in _MODULES:
        value = config.get(key)
        if key.endswith("_tmp") and value is not None and not is_template(value):
            raise HParamsError(f"{key} is {value!r}; allowed: a module's name with {{}} in the place of the layer's number")
    for key, words in (_WORDS | (_WORDS_OF_WISE if config["alg_name"] == "WISE" else {})).items():
        if key in config and config[key] not in words:
            raise HParamsError(f"{key} is {config[key]!r}; allowed: {', '.join(words)}")
    for f in fields(cls):
        value = config.get(f.name)
        if f.type in (bool, "bool") and f.name in config and not isinstance(value, bool):
            raise HParamsError(f"{f.name} is {value!r}; allowed: true, false")
        if not _holds_numbers(f) or get_origin(f.type) is list or value is None:
            continue
        # EasyEdit's annotations say int where its YAMLs have fractions, and float where false is no limit.
        or_false = f.name == "norm_constraint"
        if not _is_number(value) and not (or_false and value is False):
            raise HParamsError(f"{f.name} is {value!r}; allowed: a number{', or false' if or_false else ''}")


def _one_a_layer(config: dict[str, Any]) -> None:
    """Let EAMET's mom2_update_weight be one number a layer; one alone is every layer's, as EasyEdit's own loader has it.

    Raises:
        HParamsError: it is neither.
    """
    value, layers = config["mom2_update_weight"], config["layers"]
    weights = value if isinstance(value, list) else [value] * len(layers)
    if len(weights) != len(layers) or not all(map(_is_number, weights)):
        raise HParamsError(f"mom2_update_weight is {value!r}; allowed: a number, or one for each of the {len(layers)} layers")
    config["mom2_update_weight"] = weights


def run_as(hparams: Any, device: str | None, dtype: str | None) -> None:
    """Let any method's hyper-parameters name another device, or another ``dtype``, than their YAML; None leaves theirs.

    Raises:
        HParamsError: as :func:`.loading_dtype`.
    """
    if device:
        hparams.device = device
    if dtype:
        hparams.fp16 = dtype == "float16"
        set_dtype(hparams, dtype)


def set_dtype(hparams: Any, dtype: str | None) -> None:
    """Let any method's hyper-parameters say what the model is loaded in; None leaves it to their ``fp16``.

    Raises:
        HParamsError: as :func:`.loading_dtype`.
    """
    hparams.dtype = dtype
    loading_dtype(hparams)


# The module names that EasyEdit's YAMLs have; ours leave them out.
_MODULES = {
    "rewrite_module_tmp": "projection",
    "layer_module_tmp": "layer",
    "mlp_module_tmp": "mlp",
    "attn_module_tmp": "attention",
    "ln_f_module": "final_norm",
    "lm_head_module": "",  # see filled_in
}


def _follow_from_family(algorithm: str) -> set[str]:
    # PMET means others by these names: the output projections of the MLP and of the attention.
    return set(_MODULES) - ({"mlp_module_tmp", "attn_module_tmp"} if algorithm == "PMET" else set())


def filled_in(hparams: Any, model: Any) -> Any:
    """A copy of ``hparams`` with the module names that their YAML has left out, from the model's architecture.

    Raises:
        HParamsError: one is missing, and the architecture is not among :data:`kdpo_easyedit.method.families.FAMILIES`.
    """
    if isinstance(hparams, KDPOHyperParams):
        return hparams.for_model(model)
    check_layers(getattr(hparams, "layers", None) or [], model.config.get_text_config().num_hidden_layers)
    hparams = copy.copy(hparams)
    missing = [key for key in _MODULES if getattr(hparams, key, "") is None]
    if not missing:
        return hparams
    family = family_of(model)
    if family is None:
        raise HParamsError(
            f"{missing[0]} is missing, and does not follow from the architecture {model.config.model_type!r}; add it"
        )
    for key in missing:
        name = output_layer_of(model) if key == "lm_head_module" else getattr(family, _MODULES[key])
        # Fine-tuning takes every parameter whose name has this in it: GPT-2's bias too, without the ending.
        ending = ".weight" if key == "rewrite_module_tmp" and hparams.alg_name in ("FT", "LocFT-BF") else ""
        setattr(hparams, key, name + ending)
    return hparams


def _drop_keys_of_main(cls: type, config: dict[str, Any]) -> None:
    known = {f.name for f in fields(cls)}
    for key, value in RELEASE_BEHAVIOUR.items():
        if key not in known and config.pop(key, value) != value:
            raise HParamsError(
                f"{key} is not {value!r}, which EasyEdit's release needs it to be; its GitHub main branch has both"
            )
