"""What is mended in EasyEdit's main branch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import ref

import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from ..files import whole
from ..method.weights import fingerprint
from . import both, lifelong
from .host import ALG_DICT, HostError, is_layer_wrapper, is_wrapper, replace_everywhere, submodule


def mend() -> None:
    """Mend main, once."""
    both.mend()
    _mend_generation()
    _mend_routing()
    _mend_projections()
    _mend_eamet()
    ALG_DICT["ULTRAEDIT"] = lifelong.apply_ultraedit_to_model
    ALG_DICT["SimIE"] = _simie(ALG_DICT["SimIE"])
    _mend_dpo()
    _mend_grace()
    _mend_wise()


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

    generate_fast = submodule("util.generate").generate_fast

    @wraps(generate_fast)
    def unmasked(model: Any, *args: Any, **kwargs: Any) -> Any:
        return generate_fast(Unmasked(model), *args, **kwargs)

    replace_everywhere("generate_fast", generate_fast, unmasked)


def decide_at(model: Any, token: int) -> None:
    """Let GRACE decide by one token of what it is given next whether an edit is asked for: by its place, -1 for the last."""
    for module in model.modules():
        if hasattr(module, "key_id"):
            module.key_id = token


def _mend_routing() -> None:
    """GRACE and WISE decide at every run whether an edit is asked for: once for all rows of a batch, padding included.

    Prompts are therefore measured one at a time. GRACE decides by one token, the prompt's last; main leaves it where the last
    edit or generation had it.
    """
    utils, generate = submodule("evaluate.evaluate_utils"), submodule("util.generate")
    measure, sample = utils.test_prediction_acc, generate.generate_fast

    @wraps(measure)
    def test_prediction_acc(model: Any, tok: Any, hparams: Any, prompts: Any, targets: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_wrapper(model):
            return measure(model, tok, hparams, prompts, targets, *args, **kwargs)
        results = []
        for prompt, target in [(prompts, targets)] if isinstance(prompts, str) else zip(prompts, targets):
            decide_at(model, len(tok(prompt)["input_ids"]) - 1)
            results += measure(model, tok, hparams, prompt, target, *args, **kwargs)
        return results

    @wraps(sample)
    def generate_fast(model: Any, *args: Any, **kwargs: Any) -> Any:
        if is_wrapper(model):
            decide_at(model, -1)  # the last of what it is given
        if is_layer_wrapper(model):
            model = model.model  # which has a name, and edits as the wrapper does
        return sample(model, *args, **kwargs)

    replace_everywhere("test_prediction_acc", measure, test_prediction_acc)
    replace_everywhere("generate_fast", sample, generate_fast)


def _mend_projections() -> None:
    """AlphaEdit and its kin project an edit onto what a layer's covariance hardly reaches.

    Main knows the shape of that projection for some models' names only, writes it where it stands, and takes one that lies
    there for any model. Here it is made for every model, by main's own code, and kept in ``stats_dir`` under the fingerprint
    of the covariance; ``P_loc`` is not read.
    """
    for method, name in (("AlphaEdit", "alphaedit.AlphaEdit_main"), ("SPHERE", "SPHERE.SPHERE_main")):
        ALG_DICT[method] = _with_projection(method, ALG_DICT[method], submodule(f"models.{name}"))


def _with_projection(method: str, apply: Callable, module: ModuleType) -> Callable:
    made_for: Any = None

    @wraps(apply)
    def apply_with_projection(model: Any, tok: Any, requests: Any, hparams: Any, **kwargs: Any) -> Any:
        nonlocal made_for
        memory, weights = vars(module), [f"{hparams.rewrite_module_tmp.format(layer)}.weight" for layer in hparams.layers]
        wanted = ref(model), weights, hparams.nullspace_threshold
        if not memory["P_loaded"] or made_for != wanted:
            memory["P"] = torch.stack([_projection(module, model, tok, layer, hparams) for layer in hparams.layers])
            memory["P_loaded"], made_for = True, wanted
        if not memory["cache_c_new"] or not lifelong.goes_on(method, model, weights):  # what this method has edited so far
            memory["cache_c"], memory["cache_c_new"] = torch.zeros_like(memory["P"]), True
        hparams = copy.copy(hparams)
        hparams.P_loc = __file__  # something that exists, so that nothing is made
        edited, originals = apply(model, tok, requests, hparams, **kwargs)
        lifelong.leave(method, edited, weights)
        return edited, originals

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


def _mend_eamet() -> None:
    """EAMET leaves the tokenizer without its first token, writes its contexts on whatever device is the first, and cannot
    multiply GPT-2's weights, which are stored the other way round.
    """
    apply, generate = ALG_DICT["EAMET"], submodule("util.generate")

    @wraps(apply)
    def apply_where_it_can(model: Any, tok: Any, requests: Any, hparams: Any, **kwargs: Any) -> Any:
        name = hparams.rewrite_module_tmp.format(hparams.layers[0])
        if isinstance(model.get_submodule(name), Conv1D):
            raise HostError(f"EasyEdit's EAMET cannot edit {name} of this model, whose weights are stored the other way round")
        device = generate.normalize_device
        generate.normalize_device = lambda *_arguments, **_keywords: model.device
        try:
            return apply(model, copy.deepcopy(tok), requests, hparams, **kwargs)
        finally:
            generate.normalize_device = device

    ALG_DICT["EAMET"] = apply_where_it_can


def _simie(apply: Callable) -> Callable:
    """SimIE by hyper-parameters of ours; those of EasyEdit's own get what it has."""

    @wraps(apply)
    def apply_either(model: Any, tok: Any, requests: Any, hparams: Any, **kwargs: Any) -> Any:
        ours = isinstance(hparams, lifelong.simie_hyper_params())
        return (lifelong.apply_simie_to_model if ours else apply)(model, tok, requests, hparams, **kwargs)

    return apply_either


def _mend_dpo() -> None:
    """Main's DPO begins a new adapter at every edit, which takes the last one's place; here it goes on in the one there is."""
    module = submodule("models.dpo.dpo_main")
    begin = module.get_peft_model
    module.get_peft_model = lambda model, config: model if hasattr(model, "peft_config") else begin(model, config)


def _mend_grace() -> None:
    """GRACE freezes all that it finds, its own values too: an edit that one of these is to serve could not be learnt."""
    grace = submodule("models.grace.GRACE")
    edit = grace.GRACE.edit

    @wraps(edit)
    def edit_with_values(self: Any, *args: Any, **kwargs: Any) -> None:
        for module in self.model.modules():
            if isinstance(module, grace.GRACEAdapter) and "keys" in vars(module):
                module.values.requires_grad_()
        edit(self, *args, **kwargs)

    grace.GRACE.edit = edit_with_values


def _mend_wise() -> None:
    """Main's WISE forgets the bias of GPT-2's layers when it retrieves from a finished memory: it must not come to that.

    And it alone leaves braces in the contexts that it lets the model write, which it then takes for places to fill in.
    """
    adapter = submodule("models.wise.WISE").WISEAdapter
    save = adapter.save_weight

    def save_weight(self: Any) -> None:
        if self.bias is not None and self.config.retrieve:
            raise HostError(
                f"save_freq is {self.config.save_freq}, and that many edits are made; on GPT-2, EasyEdit's WISE can retrieve "
                "from one memory only: set save_freq above the number of edits, or retrieve to false"
            )
        save(self)

    adapter.save_weight = save_weight

    utils = submodule("models.wise.utils")
    write = utils.get_context_templates

    @wraps(write)
    def get_context_templates(*args: Any, **kwargs: Any) -> list[str]:
        contexts = [template.removesuffix("{}") for template in write(*args, **kwargs)]
        utils.CONTEXT_TEMPLATES_CACHE = [context.replace("{", "").replace("}", "") + "{}" for context in contexts]
        return utils.CONTEXT_TEMPLATES_CACHE

    replace_everywhere("get_context_templates", write, get_context_templates)
