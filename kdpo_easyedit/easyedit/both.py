"""What is mended in both EasyEdits."""

from __future__ import annotations

import math
import sys
from functools import partial, wraps
from typing import Any

from ..once import once
from ..plugin import is_easyedit
from .host import replace_everywhere, submodule


def mend() -> None:
    """Mend what both have, once."""
    _mend_adalora()
    _count_once()


def _mend_adalora() -> None:
    """EasyEdit tells AdaLoRA nothing of an edit's number of steps, which peft now insists on."""
    module = submodule("models.lora.lora_main")
    execute, config = module.execute_lora, module.AdaLoraConfig

    @wraps(execute)
    def execute_lora(model: Any, tok: Any, requests: Any, hparams: Any, *args: Any, **kwargs: Any) -> Any:
        steps = hparams.num_steps * math.ceil(len(requests) / hparams.batch_size)
        module.AdaLoraConfig = partial(config, total_step=steps)
        try:
            return execute(model, tok, requests, hparams, *args, **kwargs)
        finally:
            module.AdaLoraConfig = config

    module.execute_lora = execute_lora


def _count_once() -> None:
    """What methods make for a model and keep, all under the same names, is told apart from their edits."""
    for name in ("get_context_templates", "get_cov", "get_inv_cov", "get_project"):
        modules = [vars(its) for module_name, its in list(sys.modules.items()) if is_easyedit(module_name)]
        for function in {its[name] for its in modules if name in its}:
            if not function.__module__.endswith(".core.compute_z"):  # these contexts are new for every edit
                replace_everywhere(name, function, once(function))
