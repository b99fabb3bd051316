"""What is mended in EasyEdit's release of October 2023."""

from __future__ import annotations

import re
from functools import wraps
from typing import Any

import torch

from . import both
from .host import replace_everywhere, submodule


def mend() -> None:
    """Mend the release, once."""
    both.mend()
    _mend_metrics()
    _mend_block_outputs()
    _mend_half_precision()
    _mend_lora()


def _mend_metrics() -> None:
    """The release counts padding as if it were on the left, wherever it is, and cuts long answers off; main does neither."""
    measure = submodule("evaluate.evaluate_utils").test_prediction_acc

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

    replace_everywhere("test_prediction_acc", measure, test_prediction_acc)


def _mend_block_outputs() -> None:
    """The release's MEMIT takes a decoder block's output for a tuple, as it was; today it is the tensor itself."""
    nethook = submodule("util.nethook")
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


def _mend_half_precision() -> None:
    """The release's ROME multiplies what a model in half precision gives by float32 numbers; main casts these to that first."""

    def in_the_models(function: Any) -> Any:
        @wraps(function)
        def cast(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return function(model, *args, **kwargs).to(model.dtype)

        return cast

    for module, name in (("models.rome.compute_u", "get_inv_cov"), ("models.rome.rome_main", "compute_v")):
        vars(submodule(module))[name] = in_the_models(vars(submodule(module))[name])


def _mend_lora() -> None:
    """The release's LoRA appends an end token to the answer, and takes it for padding where the tokenizer pads with it.

    It then trains on everything but the answer's first token. A request that is alone needs no padding.
    """
    module = submodule("models.lora.lora_main")
    execute = module.execute_lora

    class Unpadded:
        pad_token_id = -1  # no token's

        def __init__(self, tok: Any) -> None:
            self.tok = tok

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tok, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.tok(*args, **kwargs)

    @wraps(execute)
    def execute_lora(model: Any, tok: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        return execute(model, Unpadded(tok) if len(requests) == 1 else tok, requests, *args, **kwargs)

    module.execute_lora = execute_lora
