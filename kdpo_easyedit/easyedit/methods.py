"""EasyEdit's methods: which of them can be compared, and how each makes an edit and takes it back."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from ..method.weights import read, write
from ..plugin import is_easyedit
from .failures import as_it_was_on_failure, check_finite
from .host import ALG_DICT, EDITOR_LOG, IS_RELEASE, HostError, easyeditor, is_layer_wrapper, is_wrapper, submodule
from .lifelong import forget, learnt, simie_hyper_params

Request = dict[str, Any]

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
    "KDPO", "FT", "ROME", "R-ROME", "MEMIT", "MEMIT-FE", "EMMET", "PMET", "AlphaEdit", "SPHERE", "CORE", "ULTRAEDIT",
    "LocFT-BF", "EAMET", "SimIE",
)  # fmt: skip
_IN_ADAPTERS = ("LoRA", "DPO")
_IN_WRAPPERS = ("GRACE", "WISE", "KN", "Retrieval")
# Of these, what leaves the weights of the model as they are and keeps edits beside them, in a memory.
_IN_MEMORY = ("GRACE", "WISE", "Retrieval")
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
    "MELO": "needs a second model, which tells prompts apart",
}


def edits_weights(hparams: Any) -> bool:
    """Whether a method's edits are in the model's own weights, and not in a copy of it."""
    return hparams.alg_name in _IN_WEIGHTS


def changes_weights(hparams: Any) -> bool:
    """Whether a method changes weights, its own copy's or an adapter's; others keep edits beside them, in a memory."""
    return hparams.alg_name not in _IN_MEMORY


def can_resume(hparams: Any) -> bool:
    """Whether a sequence that was cut off can go on from saved weights; what a wrapper holds is not saved."""
    return hparams.alg_name not in _IN_WRAPPERS


def takes_batches(hparams: Any) -> bool:
    """Whether a method makes several edits at once, of the requests of one call."""
    match hparams.alg_name:
        case "FT":  # FT-L's, after the prompt's last token, trains on the padding of answers too
            return getattr(hparams, "objective_optimization", "prompt_last") == "target_new"
        case "LoRA":  # the release's takes end tokens for padding
            return not IS_RELEASE
        case method:
            batchable: bool = submodule("editors.batch_editor").BatchEditor.is_batchable_method(method)
            return batchable or method in ("SPHERE", "EAMET", "LocFT-BF", "Retrieval")


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


def caveat(hparams: Any) -> str:
    """What has to be known of a method's figures on this EasyEdit, in words; mostly nothing."""
    whole_vocabulary = "= outputs_pos.logits.log_softmax(-1)\n"
    if hparams.alg_name == "DPO" and whole_vocabulary in inspect.getsource(submodule("models.dpo.dpo_main")):
        return (
            "the DPO of an EasyEdit from before 4 July 2026 (its commit 79ecb85), whose loss adds up the log-probabilities "
            "of all tokens there are, where DPO has those of the answers: git pull"
        )
    return ""


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
    if method == "SimIE":
        return simie_hyper_params()
    wanted = method.replace("-", "").lower() + "hyperparams"
    classes = {**vars(submodule("util.alg_dict")), **vars(easyeditor)}  # ours are in the latter
    return next(cls for name, cls in classes.items() if name.replace("_", "").lower() == wanted)


def model_to_edit(editor: Any, model: Any) -> Any:
    """What :func:`apply_edit` may be given: the model, or a copy of an unedited one that the method would wrap."""
    untouched = edits_weights(editor.hparams) or editor.hparams.alg_name == "Retrieval"
    return model if untouched or model is not editor.model else copy.deepcopy(model)


def apply_edit(
    editor: Any, model: Any, request: Request | Sequence[Request], traces: list[Any] | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """One edit by ``BaseEditor``'s method, or several at once: the edited model, and the weights that it changed, as they were.

    KDPO adds its traces to ``traces``; the others take no notice of it.

    Args:
        request: one, or several, for a method that :func:`takes_batches`.

    Raises:
        Exception: whatever the method raises, or an ArithmeticError where it has left numbers that are not finite. The model
            is then as it was.
    """
    if is_layer_wrapper(model):
        model = model.model  # the wrapped copy, in which the method finds its layer
    asked = [request] if isinstance(request, Mapping) else request
    requests = [each | _wanted_beside(editor, model, each) for each in asked]
    hparams = editor.hparams
    if len(requests) > 1 and hasattr(hparams, "batch_size") and hparams.alg_name != "LocFT-BF":  # its mini-batches'
        hparams = copy.copy(hparams)
        hparams.batch_size = len(requests)
    with as_it_was_on_failure(model, _at_risk(hparams, model)):
        for name, module in model.named_modules():
            if "lora_" in name:
                module.train()
        with _told_positions(model) if len(requests) > 1 and not is_wrapper(model) else nullcontext():
            edited, originals = editor.apply_algo(
                model,
                editor.tok,
                requests,
                hparams,
                copy=False,
                return_orig_weights=True,
                keep_original_weight=IS_RELEASE or edits_weights(hparams),  # EMMET tells of no weights otherwise
                train_ds=None,
                traces=traces,
            )
        if edits_weights(hparams):
            check_finite(read(model, originals))
        else:  # an adapter's, or what a wrapper trains
            originals = {}
            check_finite({name: weight for name, weight in edited.named_parameters() if weight.requires_grad})
    # Adapters are trained with their dropout and used without; main leaves it on.
    return edited.eval(), originals


@contextmanager
def _told_positions(model: Any) -> Iterator[None]:
    """For a block, a model that is told no positions counts them from each row's first token.

    EasyEdit pads batches on the left for some methods, and tells none: where positions are learnt, as in GPT-2, what such a
    method trains on would stand elsewhere than what is asked later.
    """
    network = model.get_base_model() if hasattr(model, "get_base_model") else model

    def tell(_module: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        mask = keywords.get("attention_mask")
        told = any(keywords.get(name) is not None for name in ("position_ids", "past_key_values"))
        if mask is not None and mask.ndim == 2 and not told:
            keywords = keywords | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        return arguments, keywords

    handle = network.base_model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _at_risk(hparams: Any, model: Any) -> list[str]:
    """The weights of a model that a method may have changed when it fails."""
    names = [name for name, _ in model.named_parameters()]
    match hparams.alg_name:
        case "KDPO":  # writes once it is done
            return []
        case "KN":  # changes weights of any layer
            return names
        case "ULTRAEDIT":
            modules = {module.removesuffix(".weight") for module in hparams.inner_params}
            return [name for name in names if name.removesuffix(".weight") in modules]
        case method if method in _IN_WEIGHTS:
            templates = getattr(hparams, "rewrite_module_tmps", [hparams.rewrite_module_tmp])
            edited = [template.format(layer) for template in templates for layer in hparams.layers]
            return [name for name in names if any(module in name for module in edited)]
        case method if method in _IN_ADAPTERS:
            return [name for name in names if "lora_" in name]
    return []


def _wanted_beside(editor: Any, model: Any, request: Request) -> dict[str, str]:
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
    forget()


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
    for module_name, its in list(sys.modules.items()):
        for name in names:
            if is_easyedit(module_name) and name in vars(its):
                setattr(its, name, copy.copy(_MEMORY[name]))


def memory() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the next edits of a sequence need of what methods keep in their modules: contexts, for JSON, and tensors."""
    contexts, tensors = {}, {}
    for name, its in list(sys.modules.items()):
        if is_easyedit(name) and vars(its).get("CONTEXT_TEMPLATES_CACHE"):
            contexts[name] = its.CONTEXT_TEMPLATES_CACHE
        if is_easyedit(name) and vars(its).get("cache_c_new"):
            tensors[name] = its.cache_c
    tensors |= {f"{method}: {name}": tensor for method, its in learnt.items() for name, tensor in its.items()}
    return contexts, tensors


def set_memory(contexts: Mapping[str, Any] | None = None, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    """Let methods remember this and nothing else; they would keep what they have for whatever model comes next."""
    _forget(*_MEMORY)
    forget()
    for name, written in (contexts or {}).items():
        submodule(name.partition(".")[2]).CONTEXT_TEMPLATES_CACHE = written
    for name, tensor in (tensors or {}).items():
        method, colon, its = name.partition(": ")
        if colon:
            learnt.setdefault(method, {})[its] = tensor
        else:
            vars(submodule(name.partition(".")[2])).update(cache_c=tensor, cache_c_new=True)


@contextmanager
def output_to(folder: Path) -> Iterator[None]:
    """For a block, EasyEdit's prints, bars and logs, and whatever it writes where it stands, go into ``folder``."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    before = root.handlers, EDITOR_LOG.handlers
    file = logging.FileHandler(logs / "easyedit.log", encoding="utf-8")
    root.handlers, EDITOR_LOG.handlers = [file], [logging.NullHandler()]
    try:
        with contextlib.chdir(folder), redirect_stdout(file.stream), redirect_stderr(file.stream):
            yield
    finally:
        root.handlers, EDITOR_LOG.handlers = before
        file.close()
