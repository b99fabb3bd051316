"""KDPO's hyper-parameters: the dataclass, its YAML, and the files that come with the package."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from yaml.error import MarkedYAMLError

from ..devices import DTYPES, device_name
from .families import family_of

_PACKAGE = Path(__file__).resolve().parent.parent
#: Where the provided YAMLs lie, one folder a method: in a wheel inside the package, in a checkout beside it.
HPARAMS_DIR = _PACKAGE / "hparams_yaml" if (_PACKAGE / "hparams_yaml").is_dir() else _PACKAGE.parent / "hparams"


class HParamsError(ValueError):
    """A hyper-parameter that cannot be used; the message names where, the key, the value and what is allowed."""


def yaml_folder(method: str) -> str:
    """The name of a method's folder of YAMLs: FT-L is what EasyEdit calls FT."""
    return "FT" if method == "FT-L" else method


def find_hparams(method: str, name_or_path: str | Path) -> Path:
    """The YAML that ``name_or_path`` means for ``method``.

    A path (with or without ``.yaml``) is a path; a bare name such as ``qwen1.5-0.5b`` that is no file here is looked up
    among the provided ``METHOD/NAME.yaml``, and ``FOLDER/NAME`` as ``FOLDER/METHOD/NAME.yaml``.

    Raises:
        HParamsError: there is no such file; the message lists the names that there are.
    """
    given = str(name_or_path)
    for candidate in (Path(given), Path(given + ".yaml")):
        if candidate.is_file():
            return candidate
    name = Path(given).name
    root = HPARAMS_DIR if name == given else Path(given).parent
    found = root / yaml_folder(method) / (name.removesuffix(".yaml") + ".yaml")
    if found.is_file():
        return found
    names = sorted(f.stem for f in (HPARAMS_DIR / yaml_folder(method)).glob("*.yaml"))
    raise HParamsError(
        f"no hyper-parameters for {method} at {given!r}: give the path of a YAML, or one of the provided names: "
        + (", ".join(names) or f"none are provided for {method}")
    )


class _Loader(yaml.SafeLoader):
    """YAML in which no key is given twice: PyYAML itself takes the last one, and says nothing."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a hyper-parameter YAML holds.

    Raises:
        HParamsError: the file is not YAML, has a key twice, or is not a mapping of keys to values.
    """
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HParamsError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(config, dict):
        raise HParamsError(f"{path}: expected a mapping of keys to values, found {type(config).__name__}")
    return config


def check_keys(cls: type, config: dict[str, Any]) -> None:
    """Whether a YAML has the keys of a dataclass of hyper-parameters.

    Raises:
        HParamsError: one is unknown, or missing.
    """
    known = {f.name: f for f in fields(cls)}
    for key, value in config.items():
        if key not in known:
            raise HParamsError(f"unknown key {key!r} (value {value!r}); allowed keys: {', '.join(known)}")
    for key, f in known.items():
        if f.default is MISSING and key not in config:
            raise HParamsError(f"missing key {key!r}" + (f": {f.metadata['help']}" if f.metadata else ""))


def loading_dtype(hparams: Any) -> torch.dtype:
    """What a model is loaded in by the hyper-parameters of any method: their ``dtype``, or EasyEdit's word for it, ``fp16``.

    Raises:
        HParamsError: it is none of :data:`.devices.DTYPES`, or the two contradict each other.
    """
    half = bool(getattr(hparams, "fp16", False))
    dtype = getattr(hparams, "dtype", None) or ("float16" if half else "float32")
    if dtype not in DTYPES:
        raise HParamsError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if half and dtype != "float16":
        raise HParamsError(f"dtype is {dtype!r} and fp16 is true, which means float16; leave one of them out")
    return getattr(torch, dtype)


# --------------------------------------------------------------------------------------------------------------------
# What a field may hold. Each check takes a value and returns it, normalised, or raises ValueError saying what is allowed.


def _number(value: Any) -> float | None:
    """A finite number, also where YAML 1.1 read ``1e-4`` as text; None where it is none."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _positive(value: Any) -> float:
    number = _number(value)
    if number is None or number <= 0:
        raise ValueError("a number above 0")
    return number


def _not_negative(value: Any) -> float:
    number = _number(value)
    if number is None or number < 0:
        raise ValueError("a number, 0 or above")
    return number


def _positive_or_false(value: Any) -> float | bool:
    if value is None or value is False:
        return False
    try:
        return float(_positive(value))
    except ValueError as error:
        raise ValueError(f"{error}, or false") from None


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number, 1 or above")
    return value


def _count_or_zero(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a whole number, 0 or above")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _flag_or_none(value: Any) -> bool | None:
    return None if value is None else _flag(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("text")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _template(value: Any) -> str | None:
    if value is not None and not is_template(value):
        raise ValueError("a module's name with {} in the place of the layer's number")
    return None if value is None else str(value)


def is_template(value: Any) -> bool:
    """Whether a value is a module's name with ``{}`` in the place of the layer's number, and no other brace."""
    return isinstance(value, str) and value.count("{}") == 1 and not set("{}") & set(value.replace("{}", ""))


def plain(hparams: Any) -> dict[str, Any]:
    """Any method's hyper-parameters as JSON can hold them; of a pair of model and tokenizer, the model's name."""
    name = hparams.model_name if isinstance(hparams.model_name, str) else hparams.model_name[0].config.name_or_path
    return dict(json.loads(json.dumps(vars(hparams) | {"model_name": str(name)}, default=str)))


def are_layers(value: Any) -> bool:
    """Whether a value is a list of layer numbers, counted from 0."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _layers(value: Any) -> list[int]:
    if not are_layers(value) or not value or len(set(value)) != len(value):
        raise ValueError("a list of different layer numbers, counted from 0")
    return value


def _device(value: Any) -> int | str:
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    try:
        if not isinstance(value, (int, str)) or isinstance(value, bool):
            raise RuntimeError
        torch.device(device_name(value))
    except RuntimeError:
        raise ValueError("a CUDA device's number, or 'cpu', 'cuda', 'cuda:1', 'mps'") from None
    return value


def _model_name(value: Any) -> Any:
    pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], torch.nn.Module)
    if not pair and not (isinstance(value, str) and value):
        raise ValueError("a model's name or folder (or, from Python, a pair of model and tokenizer)")
    return value


def _one_of(*allowed: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value not in allowed or isinstance(value, bool):
            raise ValueError(" or ".join(repr(a) for a in allowed))
        return value

    return check


def _field(help: str, check: Callable[[Any], Any], default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": help, "check": check})


# Keys of the paper's release that KDPO reads no more. Each is accepted where it changes nothing.
_RELEASE_KEYS: dict[str, tuple[Any, str]] = {
    "unused_params": (
        False,
        "it drops target tokens that stand again elsewhere in the answer, which the paper does not describe",
    ),
    "nll_term": (False, "the released code never reads it, and the paper's loss has no such term"),
    "lora": (False, "KDPO edits the weight itself; for adapters use editing_method LoRA"),
    "kl_factor": (0, "the released code never reads it, and the paper's loss has no such term"),
}


# The module names that an edit needs, and what they are of a family.
_OF_FAMILY = {"rewrite_module_tmp": "projection", "layer_module_tmp": "layer", "mlp_module_tmp": "mlp"}


@dataclass
class KDPOHyperParams:
    """Hyper-parameters of KDPO (arXiv 2406.09920), under the names of the paper's release where there is one.

    The defaults are the paper's. Build one from a YAML with :meth:`from_hparams`, or directly by keywords.

    Raises:
        HParamsError: a field holds something that it cannot hold; the message names the key and what is allowed.
    """

    alg_name: str = _field("the method: KDPO", _one_of("KDPO"))
    model_name: Any = _field("a model's name or folder, as from_pretrained takes it", _model_name)
    device: Any = _field("where to put the model: 0, 'cpu', 'cuda:1', 'mps'", _device)
    layers: list[int] = _field("the layers whose projection is edited, counted from 0", _layers)
    rewrite_module_tmp: Any = _field(
        "the projection W, with or without '.weight'; left out, it follows from the architecture",
        _template,
        None,
    )
    layer_module_tmp: Any = _field("a decoder layer; left out, as above", _template, None)
    mlp_module_tmp: Any = _field("a decoder layer's MLP; left out, as above", _template, None)
    attn_module_tmp: Any = _field("EasyEdit's; not read", _template, None)
    ln_f_module: Any = _field("EasyEdit's; not read", _text_or_none, None)
    lm_head_module: Any = _field("EasyEdit's; not read", _text_or_none, None)
    num_steps: int = _field("optimiser steps a cycle, at most", _count, 8)
    cycles: int = _field("cycles, at most", _count, 20)
    lr: float = _field("Adam's learning rate", _positive, 1e-4)
    beta: float = _field("strength of the preference (DPO's beta)", _positive, 0.1)
    stop_crit: Any = _field("a cycle ends where the loss falls below it; false: never", _positive_or_false, 1e-3)
    weight_decay: float = _field("Adam's weight decay", _not_negative, 0)
    norm_constraint: Any = _field("no element of W moves further than this; false: no limit", _positive_or_false, False)
    negatives: str = _field(
        "teacher_forced: KDPO; autoregressive: the paper's DPO ablation",
        _one_of("teacher_forced", "autoregressive"),
        "teacher_forced",
    )
    online: bool = _field("true: new negatives every cycle; false: those of the edit's start in every cycle", _flag, True)
    sequential_edit: Any = _field(
        "edits follow one another: steps are scaled; left out: known from how KDPO is called, and from what the model holds",
        _flag_or_none,
        None,
    )
    sequential_lr_scale: float = _field("what lr, or mom2_step, is multiplied by in sequential edits", _positive, 0.2)
    update_scale: float = _field("the share of the update that is applied; 2 repeats the release's doubling", _positive, 1.0)
    margin: Any = _field(
        "go on until the target leads the runner-up by so many logits at all of its tokens, in place of stop_crit; "
        "false: until it is said",
        _positive_or_false,
        False,
    )
    contexts: int = _field(
        "texts, the model's own, before the prompt, in which the edit is made as well; 0: none", _count_or_zero, 0
    )
    positions: str = _field(
        "KDPO+C: whose keys the change is built from: all, subject, subject_last (its last token); without a subject, those of "
        "the token with the largest effect",
        _one_of("all", "subject", "subject_last"),
        "all",
    )
    mom2_adjustment: bool = _field("KDPO+C: steps that change little of what W is used for; not the paper's", _flag, False)
    mom2_step: float = _field("KDPO+C: logits that a cycle's first step adds to the preference; lr is not used", _positive, 30)
    mom2_damping: float = _field("KDPO+C: λ, added to the statistics' diagonal, whose mean is 1", _positive, 0.01)
    mom2_edit_weight: float = _field("KDPO+C: what a key of a finished edit counts beside E[k kᵀ]", _not_negative, 0.01)
    mom2_dataset: str = _field("the statistics' text, as in MEMIT's YAMLs", _text, "wikipedia")
    mom2_n_samples: int = _field("the statistics' number of texts, as in MEMIT's YAMLs", _count, 100000)
    mom2_dtype: str = _field("the statistics' precision, as in MEMIT's YAMLs", _one_of("float32", "float64"), "float32")
    stats_dir: str = _field("where EasyEdit keeps statistics", _text, "./data/stats")
    batch_size: int = _field("edits that are made together, in one optimisation, of those of one call", _count, 1)
    max_length: int = _field("EasyEdit's metrics truncate to it", _count, 40)
    model_parallel: bool = _field("spread the model over the devices there are", _flag, False)
    dtype: Any = _field("load the model in it; left out: float32", _one_of(None, *DTYPES), None)
    fp16: bool = _field("EasyEdit's word for dtype: float16", _flag, False)

    def __post_init__(self) -> None:
        self.validate()

    @property
    def step_scale(self) -> float:
        """What lr, or mom2_step, is multiplied by."""
        return self.sequential_lr_scale if self.sequential_edit else 1

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> KDPOHyperParams:
        """Read a YAML: a path, with or without ``.yaml``, or the name of one that comes with the package.

        YAMLs of the paper's release are understood once their ``alg_name`` says KDPO.

        Args:
            overrides: keys whose values are these, whatever the YAML says.

        Raises:
            HParamsError: no such file; or an unknown key, a missing one, or a value that a key cannot hold.
        """
        path = find_hparams("KDPO", hparams_name_or_path)
        try:
            config = translate_release(read_yaml(path)) | dict(overrides or {})
            check_keys(cls, config)
            return cls(**config)
        except HParamsError as error:
            message = str(error)
            raise HParamsError(message if message.startswith(str(path)) else f"{path}: {message}") from None

    def validate(self) -> None:
        """Check every field, and normalise numbers that YAML 1.1 reads as text (``1e-4``).

        Raises:
            HParamsError: naming the key, its value and what is allowed.
        """
        for f in fields(self):
            value = getattr(self, f.name)
            try:
                setattr(self, f.name, f.metadata["check"](value))
            except ValueError as allowed:
                raise HParamsError(f"{f.name} is {value!r}; allowed: {allowed}") from None
        if self.mom2_adjustment:
            for key, neutral in (("negatives", "teacher_forced"), ("weight_decay", 0), ("norm_constraint", False)):
                if getattr(self, key) != neutral:
                    raise HParamsError(f"{key} is {getattr(self, key)!r}; allowed with mom2_adjustment: {neutral!r}")
        elif self.positions != "all":
            raise HParamsError(f"positions is {self.positions!r}; allowed without mom2_adjustment: 'all'")
        if self.negatives == "autoregressive":
            for key, neutral in (("margin", False), ("contexts", 0), ("batch_size", 1)):
                if getattr(self, key) != neutral:
                    raise HParamsError(f"{key} is {getattr(self, key)!r}; allowed with negatives: autoregressive: {neutral!r}")
        loading_dtype(self)

    def for_model(self, model: torch.nn.Module) -> KDPOHyperParams:
        """These hyper-parameters with the module names filled in that were left out.

        Raises:
            HParamsError: one was left out, and the model's architecture is not among :data:`.families.FAMILIES`; or the
                model is PEFT's wrapper.
        """
        if hasattr(model, "get_base_model"):  # PEFT's wrapper has names, and sometimes a forward, of its own
            raise HParamsError(
                f"the model is a {type(model).__name__}; give model.get_base_model(), in which its adapters stay"
            )
        family = family_of(model)
        missing = [key for key in _OF_FAMILY if getattr(self, key) is None]
        if missing and family is None:
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise HParamsError(
                f"{missing[0]} is missing, and does not follow from the architecture {kind!r}: name it in the YAML"
            )
        return replace(self, **{key: getattr(family, _OF_FAMILY[key]) for key in missing})

    def edited_parameters(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """The weights W that an edit changes, by their full names, lowest layer first.

        Of a projection with an adapter of PEFT's it is the base layer's, to which the adapter goes on being added.

        Raises:
            HParamsError: a layer or a template that the model does not have, or a projection that is not dense.
        """
        named, modules = self.for_model(model), dict(model.named_modules(remove_duplicate=False))
        if any(named.layer_module_tmp.format(layer) not in modules for layer in self.layers):
            depth = sum(named.layer_module_tmp.format(n) in modules for n in range(len(modules)))
            if not depth:
                raise _no_match("layer_module_tmp", named.layer_module_tmp, modules)
            check_layers(self.layers, depth)
        for key in ("mlp_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module"):
            value = getattr(named, key)
            if value is not None and value.replace("{}", str(self.layers[0])) not in modules:
                raise _no_match(key, value, modules)

        weights: dict[str, torch.nn.Parameter] = {}
        for layer in sorted(self.layers):
            name = named.rewrite_module_tmp.format(layer).removesuffix(".weight")
            if name not in modules:
                raise _no_match("rewrite_module_tmp", named.rewrite_module_tmp, modules)
            if hasattr(modules[name], "base_layer"):
                _check_adapter(name, modules[name])
                name += ".base_layer"
            weight = _dense_weight(name, modules[name])
            if not any(weight is other for other in weights.values()):  # of layers that share their modules, the first
                weights[f"{name}.weight"] = weight
        return weights


_DENSE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _dense_weight(name: str, module: torch.nn.Module) -> torch.nn.Parameter:
    """A projection's weight, where it is a matrix of numbers that can be edited.

    Raises:
        HParamsError: it is not; the message says what it is, and how to load a quantised model dense.
    """
    kind = type(module).__name__
    weight = module._parameters.get("weight")
    if type(weight) is torch.nn.Parameter and weight.dtype in _DENSE and weight.dim() == 2:
        return weight
    if isinstance(weight, torch.Tensor):
        what = f"whose weight is {weight.dim()}-dimensional, a {type(weight).__name__} of {weight.dtype}"
    else:
        what = "without a weight of its own in the plain form"
    raise HParamsError(
        f"rewrite_module_tmp leads to {name}, a {kind} {what}; allowed: a projection with a matrix in float32, float16, "
        "bfloat16 or float64. A quantised model is to be loaded dense: by from_pretrained(…, dtype=torch.bfloat16) without a "
        "quantization_config, and of a GGUF file with GgufConfig(dequantize=True)"
    )


def _check_adapter(name: str, module: Any) -> None:
    """Whether an adapter takes what the base layer computes, as LoRA does, and not its weight, as DoRA does for its norms.

    Raises:
        HParamsError: it does not, as far as PEFT tells.
    """
    if getattr(module, "lora_variant", None) or getattr(module, "lora_magnitude_vector", None):
        raise HParamsError(
            f"rewrite_module_tmp leads to {name}, with a variant of LoRA (DoRA or the like) that may read the weight which "
            f"would be edited, that of {name}.base_layer: merge the adapter first, by merge_and_unload, or take it off"
        )


def check_layers(layers: Iterable[int], depth: int) -> None:
    """Refuse layers that a model of ``depth`` layers does not have.

    Raises:
        HParamsError: one of them.
    """
    if too_far := [layer for layer in layers if layer >= depth]:
        raise HParamsError(f"layers holds {min(too_far)}; allowed: 0 to {depth - 1}, the layers of this model")


def _no_match(key: str, value: str, modules: dict[str, torch.nn.Module]) -> HParamsError:
    last = value.removesuffix(".weight").rpartition(".")[2]
    similar = [n for n in modules if n.rpartition(".")[2] == last][:3] or [n for n, m in modules.items() if n][:3]
    return HParamsError(f"{key} is {value!r}, which matches nothing in this model; it has, for example: {', '.join(similar)}")


def translate_release(config: dict[str, Any]) -> dict[str, Any]:
    """A YAML of the paper's release in our fields; one without the release's own keys is returned as it is."""
    own = {"reg_dpo", "mask_where_equal", "objective_optimization", *_RELEASE_KEYS}
    if not own & config.keys():
        return config
    config = dict(config)
    # The release's defaults, where its file leaves them out.
    config.setdefault("cycles", 1)
    config.setdefault("stop_crit", False)
    autoregressive = config.pop("reg_dpo", False)
    if autoregressive not in (True, False):
        raise HParamsError(f"reg_dpo is {autoregressive!r}; allowed: true (negatives: autoregressive) or false")
    negatives = "autoregressive" if autoregressive else "teacher_forced"
    if config.setdefault("negatives", negatives) != negatives:
        raise HParamsError(f"reg_dpo is {autoregressive!r} but negatives is {config['negatives']!r}; leave one of them out")
    if config.pop("mask_where_equal", False) and autoregressive:
        raise HParamsError(
            "mask_where_equal is True with reg_dpo; allowed: false: the paper's DPO ablation masks nothing "
            "(with teacher-forced negatives an equal pair adds nothing to the loss, masked or not)"
        )
    config.pop("objective_optimization", None)  # fine-tuning's; the released code never reads it
    for key, (neutral, reason) in _RELEASE_KEYS.items():
        value = config.pop(key, neutral)
        if value != neutral:
            raise HParamsError(f"{key} is {value!r}; allowed: {neutral!r}: {reason}")
    return config
