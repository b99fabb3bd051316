"""Loading models for EasyEdit. It chooses tokenizer and class by what a model's name contains, which leaves out most models
of today and runs code from the hub for others. Causal language models are loaded here instead, on both hosts in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..devices import device_name
from ..method.config import loading_dtype
from ..models import packed, world
from .host import ALG_DICT, EDITOR_LOG, BaseEditor, HostError, submodule
from .hparams import filled_in
from .statistics import build_world

# The methods that need the prompt's tokens to start at 0: those that main names in BaseEditor.__init__, and two that count
# tokens in the same way and that it forgets.
_PAD_RIGHT = {"ROME", "R-ROME", "MEMIT", "EMMET", "EAMET", "AlphaEdit", "CORE", "SPHERE", "PMET", "MEMIT-FE", "SimIE"}


class ModelName(str):
    """A model's name in EasyEdit's keeping. Where it looks for "gpt2" and the like in the name, it finds the model's type."""

    model_type: str

    def __new__(cls, name: str, model_type: str) -> ModelName:
        self = super().__new__(cls, name)
        self.model_type = model_type
        return self

    def __reduce__(self) -> Any:
        return ModelName, (str(self), self.model_type)

    def lower(self) -> str:
        return self.model_type

    def __contains__(self, part: object) -> bool:
        return isinstance(part, str) and part in self.model_type


def check_device(device: Any) -> None:
    """Whether this machine has a device, before anything is loaded.

    Raises:
        HostError: it does not.
    """
    try:
        if torch.empty(0, device=device_name(device)).is_meta:  # every machine's, and it holds no numbers
            raise RuntimeError
    except (RuntimeError, AssertionError):
        raise HostError(f"device is {device!r}, which this machine does not have; try 'cpu'") from None


def loading(hparams: Any) -> tuple[Any, ...]:
    """What decides which model is loaded, and how."""
    what = (getattr(hparams, key, False) for key in ("model_name", "device", "model_parallel"))
    return (*what, str(loading_dtype(hparams)))


def set_apart(methods: Iterable[Any]) -> str:
    """That methods, by their hyper-parameters, are set to edit different models, in words; nothing where they are not."""
    wanted = [loading(hparams) for hparams in methods]
    alike = all(other == wanted[0] for other in wanted)
    return "" if alike else f"the methods are set to edit different models: {wanted}"


def load_model(hparams: Any) -> tuple[Any, Any]:
    """The model that ``hparams.model_name`` names, in their :func:`.loading_dtype`, and its tokenizer.

    Raises:
        HostError: it cannot be loaded, or the device is not there.
    """
    name, spread = str(hparams.model_name), getattr(hparams, "model_parallel", False)
    if not spread:
        check_device(hparams.device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=loading_dtype(hparams),
            device_map="auto" if spread else None,
            use_safetensors=True,
        )
        tok = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load(name, error) from error
    if tok.pad_token_id is None:
        tok.pad_token_id = tok.eos_token_id
    if not spread:
        model.to(torch.device(device_name(hparams.device)))  # type: ignore[arg-type]
    return model, tok


def _cannot_load(name: str, error: Exception) -> HostError:
    # A name on the hub has one slash at most; what transformers says of a longer one speaks of names alone.
    is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        reason = f"there is no such folder{': ~ is not filled in' if name.startswith('~') else ''}"
    else:
        reason = " ".join(str(error).split())
    return HostError(
        f"model_name is {name!r}, which cannot be loaded; give a folder, a name on the model hub, or, from Python, "
        f"a pair of model and tokenizer. The reason: {reason}"
    )


def mend_loading() -> None:
    original = BaseEditor.__init__

    @wraps(original)
    def __init__(self: Any, hparams: Any) -> None:
        if not _is_causal(hparams):
            original(self, hparams)
            return
        self.alg_name, self.apply_algo = hparams.alg_name, ALG_DICT[hparams.alg_name]
        if not EDITOR_LOG.handlers:
            submodule("editors.editor").make_logs()
        vars(hparams).update(vars(_found(hparams)))
        if isinstance(hparams.model_name, str):
            self.model, self.tok = load_model(hparams)
        else:
            self.model, self.tok = hparams.model_name
            if not getattr(hparams, "model_parallel", False) and not hasattr(self.model, "hf_device_map"):
                check_device(hparams.device)
                self.model.to(torch.device(device_name(hparams.device)))
        if getattr(hparams, "use_chat_template", False) and not self.tok.chat_template:
            raise HostError("use_chat_template is true, and the model's tokenizer has no chat template; allowed: false")
        self.tok.padding_side = "right" if hparams.alg_name in _PAD_RIGHT else "left"
        if getattr(hparams, "model_parallel", False):
            hparams.device = str(self.model.device)
        config = self.model.config
        self.model_name = hparams.model_name = ModelName(config.name_or_path, config.model_type)
        self.device = torch.device(device_name(hparams.device))
        vars(hparams).update(vars(filled_in(hparams, self.model)))
        self.hparams = hparams

    BaseEditor.__init__ = __init__


def _is_causal(hparams: Any) -> bool:
    """Whether ``hparams`` name a causal language model that :func:`load_model` can load; QLoRA's are quantised."""
    name = hparams.model_name
    if not isinstance(name, str) or name in world.RECIPES or packed.is_packed(name):
        return True
    if hparams.alg_name == "QLoRA" or any(api in name for api in ("gpt-3.5", "chatglm-api")):
        return False
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder


def in_place(hparams: Any) -> Any:
    """A copy of ``hparams`` that means the same in whatever folder it is used: paths are absolute, packed models unpacked."""
    hparams = _found(hparams)
    if isinstance(hparams.model_name, str) and Path(hparams.model_name).is_dir():
        hparams.model_name = str(Path(hparams.model_name).resolve())
    if hasattr(hparams, "stats_dir"):
        hparams.stats_dir = str(Path(hparams.stats_dir).resolve())
    return hparams


def _found(hparams: Any) -> Any:
    """A copy of ``hparams``; where their model is one that needs no hub, they name its folder, and its statistics'.

    Raises:
        HostError: it cannot be had.
    """
    hparams, name = copy.copy(hparams), hparams.model_name
    if not isinstance(name, str):
        return hparams
    if name in world.RECIPES:
        built = build_world(world.RECIPES[name])
        folder, statistics = built.folder, built.statistics
    elif packed.is_packed(name):
        try:
            folder = packed.model_folder(name)
        except packed.ModelError as error:
            raise HostError(str(error)) from None
        statistics = folder / "stats"
    else:
        return hparams
    hparams.model_name = str(folder)
    if getattr(hparams, "stats_dir", None) in (name, world.NAME, *packed.MODELS):
        hparams.stats_dir = str(statistics)
    return hparams
