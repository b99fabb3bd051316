"""EasyEdit, the host: find it, make it importable, mend what a current machine breaks in it, and register KDPO.

Two things are called EasyEdit: the GitHub repository's main branch ("main"), and ``easyeditor`` 0.0.1.dev0, its only
release on PyPI ("the release"). Nothing outside this module imports or patches either.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial, wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import nltk
import numpy as np
import torch
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from . import world
from .edits import fingerprint
from .files import whole
from .weights import write

_HOW_TO_GET_IT = (
    "EasyEdit is not here. Two ways to get it: `pip install --no-deps easyeditor==0.0.1.dev0`, or "
    "`git clone https://github.com/zjunlp/EasyEdit` with EASYEDIT_HOME set to the clone."
)


def _import_easyedit() -> ModuleType:
    """The ``easyeditor`` module: the one imported already, the clone that ``EASYEDIT_HOME`` names, or the installed one.

    Raises:
        ImportError: there is none, or ``EASYEDIT_HOME`` names no clone.
    """
    if "easyeditor" in sys.modules:
        return sys.modules["easyeditor"]
    home = os.environ.get("EASYEDIT_HOME")
    if home:
        if not (Path(home) / "easyeditor" / "__init__.py").is_file():
            raise ImportError(f"EASYEDIT_HOME is {home!r}, which has no easyeditor/ in it. {_HOW_TO_GET_IT}")
        sys.path.insert(0, str(Path(home).resolve()))
    if importlib.util.find_spec("easyeditor") is None:
        raise ImportError(_HOW_TO_GET_IT)
    try:
        return importlib.import_module("easyeditor")
    except ImportError:  # of a package that is not here, or of a name that a newer one has dropped
        for name in [n for n in sys.modules if n.partition(".")[0] == "easyeditor"]:
            del sys.modules[name]
    sys.meta_path.insert(0, _Finder())
    return importlib.import_module("easyeditor")


# --------------------------------------------------------------------------------------------------------------------
# Importing it where packages are absent. Each of EasyEdit's modules is given an `import` of its own, and a stand-in for
# an absent package goes to that module alone, never into sys.modules: transformers probes for the same packages, and
# must keep hearing that they are not there.


class _StandIn(type):
    """What EasyEdit gets for an absent package and its names: to subclass, annotate and decorate with, not to call."""

    _path: str
    _remedy: str

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(f"{cls._path}.{name}", cls._remedy)

    def __getitem__(cls, item: Any) -> Any:  # in an annotation: Optional[item]
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and callable(args[0]):  # as a decorator
            return args[0]
        raise ImportError(f"{cls._path} is not here: {cls._remedy}")


def _stand_in(path: str, remedy: str) -> _StandIn:
    return _StandIn(path.rpartition(".")[2], (), {"_path": path, "_remedy": remedy})


# The release's image models import names that transformers has dropped.
_DROPPED = "easyeditor.trainer.blip2_models"


def _import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """``__import__`` as EasyEdit's modules see it."""
    absolute = importlib.util.resolve_name("." * level + name, globals["__package__"]) if level else name
    if _is_release() and f"{absolute}.".startswith(_DROPPED + "."):
        return _stand_in(absolute, "EasyEdit's release needs transformers 4.30 for images")
    try:
        return builtins.__import__(name, globals, locals, fromlist, level)
    except ModuleNotFoundError as error:
        package = absolute.partition(".")[0]
        absent = level == 0 and (error.name or "").partition(".")[0] == package
        if not absent or package == "easyeditor" or importlib.util.find_spec(package) is not None:
            raise
        return _stand_in(absolute if fromlist else package, f"install the package {package}")


def _device(value: Any) -> str:
    """What stands for ``f"cuda:{value}"`` in the release: a number is a CUDA device, everything else names itself."""
    return f"cuda:{value}" if str(value).isdigit() else str(value)


class _NoHardCodedCuda(ast.NodeTransformer):
    """``f"cuda:{x}"`` → ``_device(x)``."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        match node.values:
            case [ast.Constant(value="cuda:"), ast.FormattedValue(value=value)]:
                return ast.copy_location(ast.Call(ast.Name("_device", ast.Load()), [value], []), node)
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import, "_device": _device}
        super().exec_module(module)

    def get_code(self, fullname: str) -> Any:
        if not _is_release():
            return super().get_code(fullname)
        path = self.get_filename(fullname)
        tree = _NoHardCodedCuda().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] != "easyeditor":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _is_release() -> bool:
    """Whether the host is the release, which lacks main's module for devices."""
    spec = importlib.util.find_spec("easyeditor")
    return not (Path(spec.origin).parent / "util" / "device.py").is_file()  # type: ignore[union-attr,arg-type]


# --------------------------------------------------------------------------------------------------------------------

easyeditor: Any = _import_easyedit()
IS_RELEASE = _is_release()
NAME = "release" if IS_RELEASE else "main"


def _module(name: str) -> Any:
    """One of EasyEdit's modules; by attributes they cannot be had, since its star imports hide them."""
    return importlib.import_module(f"easyeditor.{name}")


ALG_DICT: dict[str, Callable] = _module("util.alg_dict").ALG_DICT
BaseEditor = easyeditor.BaseEditor
_EDITOR_LOG: logging.Logger = _module("editors.editor").LOG
if TYPE_CHECKING:
    HyperParams: Any = object
else:
    HyperParams = _module("util.hparams").HyperParams


class HostError(ValueError):
    """Something that this EasyEdit, or this machine, cannot do; the message says what can be done instead."""


def register(hyper_params: type, apply_to_model: Callable) -> None:
    """Make KDPO one of EasyEdit's methods, and mend the host. Doing it again changes nothing."""

    @wraps(apply_to_model)
    def apply_on_release(*args: Any, keep_original_weight: bool = False, **kwargs: Any) -> Any:
        # The release restores whatever original weights it is handed; main is always handed them, and asks itself.
        model, originals = apply_to_model(*args, keep_original_weight=keep_original_weight, **kwargs)
        return model, originals if keep_original_weight else {}

    ALG_DICT["KDPO"] = apply_on_release if IS_RELEASE else apply_to_model
    easyeditor.KDPOHyperParams = hyper_params
    easyeditor.apply_kdpo_to_model = apply_to_model
    if not hasattr(BaseEditor, "_mended_by_kdpo"):
        BaseEditor._mended_by_kdpo = True
        _mend_loading()
        _mend_fluency()
        if IS_RELEASE:
            _mend_metrics()
            _mend_block_outputs()
        else:
            _mend_generation()
            _mend_routing()
            _mend_projections()
            _mend_dpo()
            _mend_grace()
            _mend_wise()


# --------------------------------------------------------------------------------------------------------------------
# Loading. EasyEdit chooses tokenizer and class by what a model's name contains, which leaves out most models of today
# and runs code from the hub for others. Causal language models are loaded here instead, on both in the same way.

# The methods that need the prompt's tokens to start at 0: those that main names in BaseEditor.__init__, and two that count
# tokens in the same way and that it forgets.
_PAD_RIGHT = {"ROME", "R-ROME", "MEMIT", "EMMET", "EAMET", "AlphaEdit", "CORE", "SPHERE", "PMET", "MEMIT-FE"}


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
        torch.empty(0, device=_device(device))
    except (RuntimeError, AssertionError):
        raise HostError(f"device is {device!r}, which this machine does not have; try 'cpu'") from None


def load_model(hparams: Any) -> tuple[Any, Any]:
    """The model that ``hparams.model_name`` names, in float32 or, with ``fp16``, in half precision, and its tokenizer.

    Raises:
        HostError: it cannot be loaded, or the device is not there.
    """
    name, spread = str(hparams.model_name), getattr(hparams, "model_parallel", False)
    if not spread:
        check_device(hparams.device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.float16 if getattr(hparams, "fp16", False) else torch.float32,
            device_map="auto" if spread else None,
            use_safetensors=True,
        )
        tok = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load(name, error) from error
    if tok.pad_token_id is None:
        tok.pad_token_id = tok.eos_token_id
    if not spread:
        model.to(torch.device(_device(hparams.device)))  # type: ignore[arg-type]
    return model, tok


def _cannot_load(name: str, error: Exception) -> HostError:
    return HostError(
        f"model_name is {name!r}, which cannot be loaded; give a folder, a name on the model hub, or, from Python, "
        f"a pair of model and tokenizer. The reason: {' '.join(str(error).split())}"
    )


def _mend_loading() -> None:
    original = BaseEditor.__init__

    @wraps(original)
    def __init__(self: Any, hparams: Any) -> None:
        if not _is_causal(hparams):
            original(self, hparams)
            return
        self.alg_name, self.apply_algo = hparams.alg_name, ALG_DICT[hparams.alg_name]
        if not _EDITOR_LOG.handlers:
            _module("editors.editor").make_logs()
        vars(hparams).update(vars(_with_world(hparams)))
        if isinstance(hparams.model_name, str):
            self.model, self.tok = load_model(hparams)
        else:
            self.model, self.tok = hparams.model_name
        self.tok.padding_side = "right" if hparams.alg_name in _PAD_RIGHT else "left"
        if getattr(hparams, "model_parallel", False):
            hparams.device = str(self.model.device)
        config = self.model.config
        self.model_name = hparams.model_name = ModelName(config.name_or_path, config.model_type)
        self.device = torch.device(_device(hparams.device))
        self.hparams = hparams

    BaseEditor.__init__ = __init__


def _is_causal(hparams: Any) -> bool:
    """Whether ``hparams`` name a causal language model that :func:`load_model` can load; QLoRA's are quantised."""
    name = hparams.model_name
    if not isinstance(name, str) or name in world.RECIPES:
        return True
    if hparams.alg_name == "QLoRA" or any(api in name for api in ("gpt-3.5", "chatglm-api")):
        return False
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder


# --------------------------------------------------------------------------------------------------------------------
# What else is mended.


def _mend_fluency() -> None:
    """EasyEdit splits text into words with data that nltk downloads; without it, nltk's untrained splitter does."""

    def words(text: str) -> list[str]:
        try:
            return nltk.word_tokenize(text)
        except LookupError:
            sentences = PunktSentenceTokenizer().tokenize(text)
            return [word for sentence in sentences for word in NLTKWordTokenizer().tokenize(sentence)]

    _module("evaluate.evaluate_utils").compute_freq = lambda sentence, n=2: nltk.FreqDist(nltk.ngrams(words(sentence), n))


def _mend_generation() -> None:
    """Main's sampling passes a mask of the newest token alone, which today's transformers takes for the whole sequence's.

    Every token then attended to the first one only. The sampling pads on the right and needs no mask.
    """

    class Unmasked:
        def __init__(self, model: Any) -> None:
            self.model = model

        def __getattr__(self, name: str) -> Any:
            return getattr(self.model, name)

        def __call__(self, **inputs: Any) -> Any:
            return self.model(**{**inputs, "attention_mask": None})

    generate_fast = _module("util.generate").generate_fast

    @wraps(generate_fast)
    def unmasked(model: Any, *args: Any, **kwargs: Any) -> Any:
        return generate_fast(Unmasked(model), *args, **kwargs)

    _replace_everywhere("generate_fast", generate_fast, unmasked)


def _mend_routing() -> None:
    """GRACE and WISE decide at every run whether an edit is asked for: once for all rows of a batch, padding included.

    Prompts are therefore measured one at a time. GRACE decides by one token, the prompt's last; main leaves it where the last
    edit or generation had it.
    """
    utils, generate = _module("evaluate.evaluate_utils"), _module("util.generate")
    measure, sample = utils.test_prediction_acc, generate.generate_fast

    def decide_at(model: Any, token: int) -> None:
        for module in model.modules():
            if hasattr(module, "key_id"):
                module.key_id = token

    @wraps(measure)
    def test_prediction_acc(model: Any, tok: Any, hparams: Any, prompts: Any, targets: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_wrapper(model):
            return measure(model, tok, hparams, prompts, targets, *args, **kwargs)
        results = []
        for prompt, target in [(prompts, targets)] if isinstance(prompts, str) else zip(prompts, targets):
            decide_at(model, len(tok(prompt)["input_ids"]) - 1)
            results += measure(model, tok, hparams, prompt, target, *args, **kwargs)
        return results

    @wraps(sample)
    def generate_fast(model: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_wrapper(model):
            decide_at(model, -1)  # the last of what it is given
            model = model.model  # which has a name, and edits as the wrapper does
        return sample(model, *args, **kwargs)

    _replace_everywhere("test_prediction_acc", measure, test_prediction_acc)
    _replace_everywhere("generate_fast", sample, generate_fast)


def _mend_projections() -> None:
    """AlphaEdit and its kin project an edit onto what a layer's covariance hardly reaches.

    Main knows the shape of that projection for some models' names only, writes it where it stands, and takes one that lies
    there for any model. Here it is made for every model, by main's own code, and kept in ``stats_dir`` under the fingerprint
    of the covariance; ``P_loc`` is not read.
    """
    for method, name in (("AlphaEdit", "alphaedit.AlphaEdit_main"), ("SPHERE", "SPHERE.SPHERE_main")):
        ALG_DICT[method] = _with_projection(ALG_DICT[method], _module(f"models.{name}"))


def _with_projection(apply: Callable, module: ModuleType) -> Callable:
    @wraps(apply)
    def apply_with_projection(model: Any, tok: Any, requests: Any, hparams: Any, **kwargs: Any) -> Any:
        memory = vars(module)
        if not memory["P_loaded"]:
            memory["P"] = torch.stack([_projection(module, model, tok, layer, hparams) for layer in hparams.layers])
            memory["P_loaded"] = True
        if not memory["cache_c_new"]:  # what this method has edited so far
            memory["cache_c"], memory["cache_c_new"] = torch.zeros_like(memory["P"]), True
        hparams = copy.copy(hparams)
        hparams.P_loc = __file__  # something that exists, so that nothing is made
        return apply(model, tok, requests, hparams, **kwargs)

    return apply_with_projection


def _projection(module: Any, model: Any, tok: Any, layer: int, hparams: Any) -> torch.Tensor:
    layer_name = hparams.rewrite_module_tmp.format(layer)
    statistics = hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype
    covariance = module.get_cov(model, tok, layer_name, *statistics, hparams=hparams)
    file = Path(hparams.stats_dir) / "projections" / f"{fingerprint(covariance)}-{hparams.nullspace_threshold}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as unfinished:
            save_file({"P": module.get_project(model, tok, layer, hparams).contiguous()}, unfinished)
    return load_file(file)["P"]


def _mend_dpo() -> None:
    """Main's DPO begins a new adapter at every edit, which takes the last one's place; here it goes on in the one there is."""
    module = _module("models.dpo.dpo_main")
    begin = module.get_peft_model
    module.get_peft_model = lambda model, config: model if hasattr(model, "peft_config") else begin(model, config)


def _mend_grace() -> None:
    """GRACE freezes all that it finds, its own values too: an edit that one of these is to serve could not be learnt."""
    grace = _module("models.grace.GRACE")
    edit = grace.GRACE.edit

    @wraps(edit)
    def edit_with_values(self: Any, *args: Any, **kwargs: Any) -> None:
        for module in self.model.modules():
            if isinstance(module, grace.GRACEAdapter) and "keys" in vars(module):
                module.values.requires_grad_()
        edit(self, *args, **kwargs)

    grace.GRACE.edit = edit_with_values


def _mend_wise() -> None:
    """Main's WISE forgets the bias of GPT-2's layers when it retrieves from a finished memory: it must not come to that."""
    adapter = _module("models.wise.WISE").WISEAdapter
    save = adapter.save_weight

    def save_weight(self: Any) -> None:
        if self.bias is not None and self.config.retrieve:
            raise HostError(
                f"save_freq is {self.config.save_freq}, and that many edits are made; on GPT-2, EasyEdit's WISE can retrieve "
                "from one memory only: set save_freq above the number of edits, or retrieve to false"
            )
        save(self)

    adapter.save_weight = save_weight


def _replace_everywhere(name: str, old: Any, new: Any) -> None:
    """Let all of EasyEdit's modules that have imported ``old`` under a name have ``new``."""
    for module_name, module in list(sys.modules.items()):
        if _is_easyedit(module_name) and getattr(module, name, None) is old:
            setattr(module, name, new)


def _mend_metrics() -> None:
    """The release counts padding as if it were on the left, wherever it is, and cuts long answers off; main does neither."""
    measure = _module("evaluate.evaluate_utils").test_prediction_acc

    @wraps(measure)
    def test_prediction_acc(model: Any, tok: Any, hparams: Any, prompts: Any, targets: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = [(prompts, targets)] if isinstance(prompts, str) else zip(prompts, targets)
        longest = max(len(tok.encode(f"{prompt} {target}")) for prompt, target in pairs)
        before = tok.padding_side, hparams.max_length
        tok.padding_side, hparams.max_length = "left", max(hparams.max_length, longest + 1)
        try:
            return measure(model, tok, hparams, prompts, targets, *args, **kwargs)
        finally:
            tok.padding_side, hparams.max_length = before

    _replace_everywhere("test_prediction_acc", measure, test_prediction_acc)


def _mend_block_outputs() -> None:
    """The release's MEMIT takes a decoder block's output for a tuple, as it was; today it is the tensor itself."""
    nethook = _module("util.nethook")
    trace = nethook.Trace

    class Trace(trace):  # type: ignore[misc,valid-type]
        def __init__(self, module: Any, layer: Any = None, *args: Any, edit_output: Any = None, **kwargs: Any) -> None:
            self.is_block = bool(re.search(r"\.\d+$", layer or ""))
            edit = edit_output
            if self.is_block and edit is not None:

                def edit_output(output: Any, layer: Any) -> Any:
                    if not isinstance(output, torch.Tensor):
                        return nethook.invoke_with_optional_args(edit, output=output, layer=layer)
                    return nethook.invoke_with_optional_args(edit, output=(output,), layer=layer)[0]

            super().__init__(module, layer, *args, edit_output=edit_output, **kwargs)

        @property
        def output(self) -> Any:
            return (self._output,) if self.is_block and isinstance(self._output, torch.Tensor) else self._output

        @output.setter
        def output(self, output: Any) -> None:
            self._output = output

    nethook.Trace = Trace


# --------------------------------------------------------------------------------------------------------------------
# What a comparison asks of EasyEdit.

#: Keys of main's hyper-parameters that the release lacks, each with what the release does.
RELEASE_BEHAVIOUR = {
    "objective_optimization": "prompt_last",
    "lora_type": "adalora",
    "fp16": False,
    "model_parallel": False,
}

# A method's edits are in the model's own weights, and it tells which; or they are in a copy of the model: in the weights of
# an adapter, or in whatever else the method wraps the copy in.
_IN_WEIGHTS = (
    "KDPO", "FT", "ROME", "R-ROME", "MEMIT", "MEMIT-FE", "EMMET", "PMET", "AlphaEdit", "SPHERE", "CORE",
)  # fmt: skip
_IN_ADAPTERS = ("LoRA", "DPO")
_IN_WRAPPERS = ("GRACE", "WISE", "KN")
COMPARABLE = (*_IN_WEIGHTS, *_IN_ADAPTERS, *_IN_WRAPPERS)
_PACKAGES = {"LoRA": "peft", "DPO": "peft", "KN": "einops"}

# What else EasyEdit names, and why a comparison leaves it out.
_LEFT_OUT = {
    **dict.fromkeys(("MEND", "SERAC"), "needs an editor that was trained for the model"),
    "IKE": "edits nothing: it puts examples from a training set before every prompt",
    **dict.fromkeys(("FT-Api", "DeepEdit-Api"), "edits a model behind somebody's API"),
    "QLoRA": "edits a quantised model, and a comparison needs one model for all methods",
    "DINM": "edits what a model refuses to say, not facts",
    "DEFER": "decides by the answer's last token, which nobody has before the answer is there",
    "EAMET": "cannot edit GPT-2, on which methods are tried out here",
    "MELO": "needs a second model, which tells prompts apart",
    "SimIE": "is a way to run another method, which it would have to load",
    "ULTRAEDIT": "keeps the first model that it is given, and does not tell which weights it changed",
}


def edits_weights(hparams: Any) -> bool:
    """Whether a method's edits are in the model's own weights, and not in a copy of it."""
    return hparams.alg_name in _IN_WEIGHTS


def can_resume(hparams: Any) -> bool:
    """Whether a sequence that was cut off can go on from saved weights; what a wrapper holds is not saved."""
    return hparams.alg_name not in _IN_WRAPPERS


def adapter_weights(model: Any) -> list[str]:
    """The names of an adapter's weights."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def check_method(hparams: Any, sequential: bool) -> None:
    """Whether a method runs here.

    Raises:
        HostError: it does not.
    """
    package = _PACKAGES.get(hparams.alg_name)
    if package and importlib.util.find_spec(package) is None:
        raise HostError(f"{hparams.alg_name} needs the package {package}, which is not here: pip install {package}")
    if hparams.alg_name == "LoRA" and sequential and IS_RELEASE:
        raise HostError("LoRA begins a new adapter at every edit on EasyEdit's release; sequential edits need its main branch")
    if hparams.alg_name == "WISE" and (not hparams.save_freq or hparams.merge_freq % hparams.save_freq):
        raise HostError(f"merge_freq is {hparams.merge_freq!r}; allowed: a multiple of save_freq, {hparams.save_freq!r}")


def hyper_params_class(method: str) -> type:
    """EasyEdit's hyper-parameter dataclass of a method.

    Raises:
        HostError: this EasyEdit does not have the method, or a comparison cannot run it.
    """
    if method not in COMPARABLE:
        reason = f", which {_LEFT_OUT[method]}" if method in _LEFT_OUT else ""
        raise HostError(f"editing_method is {method!r}{reason}; allowed: {', '.join(COMPARABLE)}")
    if method not in ALG_DICT:
        here, there = ("release", "GitHub main branch") if IS_RELEASE else ("GitHub main branch", "release")
        raise HostError(f"editing_method is {method!r}, which EasyEdit's {here} does not have, but its {there} does")
    wanted = method.replace("-", "").lower() + "hyperparams"
    classes = {**vars(_module("util.alg_dict")), "KDPOHyperParams": easyeditor.KDPOHyperParams}
    return next(cls for name, cls in classes.items() if name.replace("_", "").lower() == wanted)


def edit_quality(editor: Any, model: Any, request: dict[str, Any], fluency: bool = True) -> dict[str, Any]:
    """EasyEdit's metrics of one request on a model: ``rewrite_acc``, ``rephrase_acc``, ``locality`` …"""
    hparams = copy.copy(editor.hparams)
    hparams.alg_name = "KDPO"  # main measures GRACE by other means than all others, which nothing could be compared with
    return _module("evaluate").compute_edit_quality(
        model, editor.model_name, hparams, editor.tok, request, hparams.device, test_generation=fluency
    )


def own_summary(metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What EasyEdit itself makes of a run's metrics, by phase; None on the release, which makes nothing of them.

    Every key is averaged on its own, over the edits that have it. Main prints the result and returns nothing, and writes the
    metrics once more where it stands.
    """
    if IS_RELEASE:
        return None
    module = _module("editors.utils")
    printed: list[tuple[Any, ...]] = []
    module.print = lambda *values: printed.append(values)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            module.summary_metrics(metrics)
    finally:
        del module.print
    return next(values[1] for values in printed if values[0] == "Metrics Summary: ")


def model_to_edit(editor: Any, model: Any) -> Any:
    """What :func:`apply_edit` may be given: the model, or a copy of an unedited one where edits are not in its weights."""
    return copy.deepcopy(model) if model is editor.model and not edits_weights(editor.hparams) else model


def apply_edit(
    editor: Any, model: Any, request: dict[str, Any], traces: list[Any] | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """One edit by ``BaseEditor``'s method: the edited model, and the weights that it changed, as they were.

    KDPO adds its trace to ``traces``; the others take no notice of it.
    """
    if _is_wrapper(model):
        model = model.model  # the wrapped copy, in which the method finds its layer
    request = request | _wanted_beside(editor, model, request)
    for name, module in model.named_modules():
        if "lora_" in name:
            module.train()
    edited, originals = editor.apply_algo(
        model,
        editor.tok,
        [request],
        editor.hparams,
        copy=False,
        return_orig_weights=True,
        keep_original_weight=IS_RELEASE or edits_weights(editor.hparams),  # EMMET tells of no weights otherwise
        train_ds=None,
        traces=traces,
    )
    # Adapters are trained with their dropout and used without; main leaves it on.
    return edited.eval(), originals if edits_weights(editor.hparams) else {}


def _wanted_beside(editor: Any, model: Any, request: dict[str, Any]) -> dict[str, str]:
    """What some methods want to know beside the request, or otherwise than it says.

    DPO's answer to avoid is what the model says now, as many tokens as the target has. WISE's text that the edit is not about
    is something that the model writes from nothing: what locality is measured on must not be known to any method. PMET puts
    the space before a target for models with "gpt" in their names only, where its kin do for all.
    """
    tok = editor.tok

    def written(ids: list[int], tokens: int, **how: Any) -> str:
        inputs = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            output = model.generate(inputs, max_new_tokens=tokens, pad_token_id=tok.pad_token_id, **how)
        return tok.decode(output[0, len(ids) :], skip_special_tokens=True).strip()

    match editor.hparams.alg_name:
        case "DPO":
            length = len(tok(f" {request['target_new']}", add_special_tokens=False)["input_ids"])
            return {"target_neg": written(tok(request["prompt"])["input_ids"], length, do_sample=False)}
        case "PMET":
            return {"target_new": f" {request['target_new']}"}
        case "WISE":
            start = tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id
            return {"loc_prompt": written([start], 10, do_sample=True)}
    return {}


def undo_edits(editor: Any, originals: dict[str, torch.Tensor]) -> None:
    """Give ``editor.model`` back the weights that :func:`apply_edit` told of, and let the method forget its edits."""
    write(editor.model, originals)
    _forget("cache_c_new", "edit_history", "merge_group_edit_history")


# What methods keep in their modules, and what it is before anything is kept: contexts that they have written for the model,
# its covariances and what follows from them, and the edits of a sequence.
_MEMORY: dict[str, Any] = {
    "CONTEXT_TEMPLATES_CACHE": None,
    "COV_CACHE": {},
    "inv_mom2_cache": {},
    "P_loaded": False,
    "cache_c_new": False,
    "edit_history": [],
    "merge_group_edit_history": [],
}


def _forget(*names: str) -> None:
    for module_name, module in list(sys.modules.items()):
        for name in names:
            if _is_easyedit(module_name) and name in vars(module):
                setattr(module, name, copy.copy(_MEMORY[name]))


def memory() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the next edits of a sequence need of what methods keep in their modules: contexts, for JSON, and tensors."""
    contexts, tensors = {}, {}
    for name, module in list(sys.modules.items()):
        if _is_easyedit(name) and vars(module).get("CONTEXT_TEMPLATES_CACHE"):
            contexts[name] = module.CONTEXT_TEMPLATES_CACHE
        if _is_easyedit(name) and vars(module).get("cache_c_new"):
            tensors[name] = module.cache_c
    return contexts, tensors


def set_memory(contexts: Mapping[str, Any] | None = None, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    """Let methods remember this and nothing else; they would keep what they have for whatever model comes next."""
    _forget(*_MEMORY)
    for name, written in (contexts or {}).items():
        _module(name.partition(".")[2]).CONTEXT_TEMPLATES_CACHE = written
    for name, keys in (tensors or {}).items():
        vars(_module(name.partition(".")[2])).update(cache_c=keys, cache_c_new=True)


def _is_wrapper(model: Any) -> bool:
    """Whether a model is of one of EasyEdit's own classes, which keep edits in a layer that they put into it."""
    return _is_easyedit(type(model).__module__)


def _is_easyedit(module_name: str) -> bool:
    return module_name.partition(".")[0] == "easyeditor"


@contextmanager
def output_to(folder: Path) -> Iterator[None]:
    """For a block, EasyEdit's prints, bars and logs, and whatever it writes where it stands, go into ``folder``."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    before = root.handlers, _EDITOR_LOG.handlers
    file = logging.FileHandler(logs / "easyedit.log", encoding="utf-8")
    root.handlers, _EDITOR_LOG.handlers = [file], [logging.NullHandler()]
    try:
        with contextlib.chdir(folder), redirect_stdout(file.stream), redirect_stderr(file.stream):
            yield
    finally:
        root.handlers, _EDITOR_LOG.handlers = before
        file.close()


# --------------------------------------------------------------------------------------------------------------------
# The world, with the covariance statistics that MEMIT needs.


def build_world(recipe: world.Recipe = world.Recipe(), quiet: bool = False) -> world.World:
    """The world of :func:`kdpo_easyedit.world.build`, with covariance statistics where EasyEdit's MEMIT looks for them.

    Raises:
        WorldError, OSError: as :func:`kdpo_easyedit.world.build`.
    """
    built = world.build(recipe, quiet)
    names = recipe.projections
    files = {n: statistics_file(built.statistics, str(built.folder), n, world.NAME, recipe.samples) for n in names}
    missing = [name for name in names if not files[name].is_file()]
    known, count = built.second_moments() if missing else ({}, 0)
    for name in [name for name in missing if name in known]:
        missing.remove(name)
        files[name].parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=files[name].parent) as unfinished:
            file = Path(unfinished) / files[name].name
            kind = "easyeditor.util.runningstats.SecondMoment()"
            stored: dict[str, Any] = {"constructor": kind, "count": count, "mom2": known[name].numpy()}
            np.savez(file, sample_size=recipe.samples, **{f"mom2.{key}": value for key, value in stored.items()})
            file.replace(files[name])
    if missing:
        model = AutoModelForCausalLM.from_pretrained(built.folder)
        tok = AutoTokenizer.from_pretrained(built.folder)
        for name in tqdm(missing, desc="covariance statistics of the world", unit="layer", disable=quiet):
            compute_statistics(model, tok, name, built.statistics, world.NAME, recipe.samples, texts=built.passages())
    return built


def in_place(hparams: Any) -> Any:
    """A copy of ``hparams`` that means the same in whatever folder it is used: with absolute paths, and the world built."""
    hparams = _with_world(hparams)
    if isinstance(hparams.model_name, str) and Path(hparams.model_name).is_dir():
        hparams.model_name = str(Path(hparams.model_name).resolve())
    if hasattr(hparams, "stats_dir"):
        hparams.stats_dir = str(Path(hparams.stats_dir).resolve())
    return hparams


def _with_world(hparams: Any) -> Any:
    """A copy of ``hparams``; where their model is the world, it is built and they name its folder and statistics."""
    hparams = copy.copy(hparams)
    if hparams.model_name in world.RECIPES:
        built = build_world(world.RECIPES[hparams.model_name])
        hparams.model_name = str(built.folder)
        if hasattr(hparams, "stats_dir"):
            hparams.stats_dir = str(built.statistics)
    return hparams


def statistics_file(
    stats_dir: Path, model_name: str, layer_name: str, dataset: str, samples: int, dtype: str = "float32"
) -> Path:
    """Where EasyEdit keeps the second moment of a layer's input."""
    folder = model_name.replace("/", "_") if IS_RELEASE else model_name.rsplit("/")[-1]
    return stats_dir / folder / f"{dataset}_stats" / f"{layer_name}_{dtype}_mom2_{samples}.npz"


def make_statistics(model: Any, tok: Any, hparams: Any, texts: Sequence[str] = (), quiet: bool = False) -> list[Path]:
    """EasyEdit's files of the second moments that a method needs, one a layer; those that are missing are made.

    Args:
        texts: what to take them over; left out, EasyEdit fetches the dataset that they are named after.
        quiet: show no progress.

    Raises:
        HostError: one is missing and cannot be made here.
    """
    if not getattr(hparams, "mom2_adjustment", hasattr(hparams, "mom2_dataset")):
        return []
    stats_dir, settings = Path(hparams.stats_dir), (hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype)
    files = []
    for layer in sorted(hparams.layers):
        name = hparams.rewrite_module_tmp.format(layer).removesuffix(".weight")
        file = statistics_file(stats_dir, model.config.name_or_path, name, *settings)
        files.append(file)
        if file.is_file():
            continue
        try:
            bar = partial(tqdm, desc=f"statistics of {name}", unit="batch", file=sys.__stderr__, disable=quiet)
            compute_statistics(model, tok, name, stats_dir, *settings, texts=texts, progress=bar)
        except Exception as error:  # whatever a dataset that cannot be had comes as
            raise HostError(
                f"{file}: there are no such statistics, and they cannot be computed from {hparams.mom2_dataset!r} here "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); run_kdpo.py --stats_text FILE computes "
                "them from a text of yours"
            ) from None
    return files


def second_moment(file: Path) -> torch.Tensor:
    """E[k kᵀ] of a layer's input k, from EasyEdit's file: float64, ``[in, in]``.

    Raises:
        HostError: it cannot be read.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            moment = torch.from_numpy(stored["mom2.mom2"]).double() / int(stored["mom2.count"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise HostError(f"{file}: not a file of EasyEdit's statistics: {error}; remove it, and have it made anew") from None
    if not torch.isfinite(moment).all():
        raise HostError(f"{file}: it holds numbers that are not finite; remove it, and have it made anew")
    return moment


def compute_statistics(
    model: Any,
    tok: Any,
    layer_name: str,
    stats_dir: Path,
    dataset: str,
    samples: int,
    dtype: str = "float32",
    texts: Sequence[str] = (),
    progress: Callable[..., Any] = lambda batches, total: batches,
) -> None:
    """Second moments of a layer's input, by EasyEdit's own code, into EasyEdit's own file.

    Args:
        texts: what to take them over; left out, the dataset of that name, which EasyEdit fetches.
        progress: shows it, as tqdm does.
    """
    target = statistics_file(stats_dir, model.config.name_or_path, layer_name, dataset, samples, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    module = _module("models.rome.layer_stats")
    load_dataset = module.load_dataset
    if texts:
        # EasyEdit knows the names of two datasets and no others; under one of them it is handed these texts instead.
        module.load_dataset = lambda *_: {"train": [{"text": text} for text in texts]}
    try:
        with (
            tempfile.TemporaryDirectory(dir=target.parent) as unfinished,
            redirect_stdout(None),
            warnings.catch_warnings(action="ignore", category=UserWarning),  # of memory pinned for no GPU
        ):
            module.layer_stats(
                model,
                tok,
                layer_name,
                unfinished,
                "wikipedia" if texts else dataset,
                to_collect=["mom2"],
                sample_size=samples,
                precision=dtype,
                progress=progress,
                hparams=SimpleNamespace(device=str(model.device)),
            )
            (file,) = Path(unfinished).rglob("*.npz")
            file.replace(target)
    finally:
        module.load_dataset = load_dataset
