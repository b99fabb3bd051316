"""A change of weights as a low-rank adapter, in the form that PEFT reads and writes.

A LoRA adapter adds B A x to what a module makes of x.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..method.weights import Weights
from .base import says
from .factors import best, spectrum
from .file import EditsError, apply_edits, changes_made, edits_applied, read_header

#: Without a rank, the smallest whose relative error, ‖Δ − B A‖ / ‖Δ‖ in the Frobenius norm, is at most this.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Adapter:
    """What is added to the outputs of modules.

    Attributes:
        factors: B and A by the names of the modules; float32, ``[out, r]`` and ``[r, in]``, on the CPU.
        error: ‖Δ − B A‖ / ‖Δ‖ in the Frobenius norm, over all weights together.
        transposed: whether the modules are ``Conv1D``, which store W as ``[in, out]``.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    error: float
    transposed: bool

    @property
    def rank(self) -> int:
        """r, the same for all."""
        return max(a.shape[0] for _, a in self.factors.values())

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """For a block, let a model have the adapter: what a server of adapters computes."""
        with ExitStack() as hooks:
            for name, (b, a) in self.factors.items():
                handle = model.get_submodule(name).register_forward_hook(_adding(b, a))
                hooks.callback(handle.remove)
            yield

    def save(self, folder: str | Path, base_model: str) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``, for PEFT's ``from_pretrained``.

        Raises:
            EditsError: the folder is there and is not empty.
        """
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,  # B A is scaled by alpha / r
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(self.factors),
            "fan_in_fan_out": self.transposed,
        }
        tensors = {}
        for name, (b, a) in self.factors.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.clone(memory_format=torch.contiguous_format)
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.clone(memory_format=torch.contiguous_format)
        with whole_folder(folder) as unfinished:
            save_file(tensors, unfinished / "adapter_model.safetensors", {"format": "pt"})
            (unfinished / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapter_of(model: PreTrainedModel, path: str | Path, rank: int | None = None) -> Adapter:
    """The adapter that makes a file's edits.

    Args:
        model: unedited; left as it is.
        path: of the file of edits.
        rank: of the adapter; None for the smallest whose error is at most :data:`TOLERANCE`.

    Raises:
        EditsError: as :func:`.apply_edits`; a rank below 1; a change that no adapter can make.
    """
    if rank is not None and rank < 1:
        raise EditsError(f"rank is {rank}; allowed: 1 or above")
    return _adapter(model, changes_made(model, path), rank)


def lost_edits(
    model: PreTrainedModel, tok: Any, path: str | Path, adapter: Adapter
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The requests of a file that its edits have the model say and the adapter does not; and those that neither does.

    Says means by teacher forcing, :func:`.base.says`.
    """
    requests = read_header(path)["requests"]
    with edits_applied(model, path):
        edited = [says(model, tok, request) for request in requests]
    with adapter.on(model):
        adapted = [says(model, tok, request) for request in requests]
    both = list(zip(requests, edited, adapted))
    return [r for r, full, low in both if full and not low], [r for r, full, low in both if not full and not low]


def save_merged(model: PreTrainedModel, tok: Any, path: str | Path, folder: str | Path, cast: bool = False) -> None:
    """Write the whole model with a file's edits, for ``from_pretrained``; the model given has them from then on.

    Raises:
        EditsError: as :func:`.apply_edits`; the folder is there and is not empty.
    """
    with whole_folder(folder) as unfinished:
        apply_edits(model, path, cast=cast)
        model.save_pretrained(unfinished)
        tok.save_pretrained(unfinished)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """For a block that writes a folder: another one, which takes its name once it is whole.

    Raises:
        EditsError: the folder is there and is not empty, or is the one that the process is in.
    """
    folder = Path(folder).resolve()
    if folder == Path.cwd():  # whose place another would take
        raise EditsError(f"{folder} is the current folder; name one that is not there yet")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EditsError(f"{folder} is there already; name a folder that is not, or is empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-unfinished-"))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _adapter(model: PreTrainedModel, changes: Weights, rank: int | None) -> Adapter:
    """From changes as the model stores them, float64."""
    modules = {name: _modules(model, name) for name in changes}
    transposed = {name: isinstance(model.get_submodule(modules[name][0]), Conv1D) for name in changes}
    deltas = {name: change.T if transposed[name] else change for name, change in changes.items()}
    spectra = {name: spectrum(delta) for name, delta in deltas.items()}
    total = sum(values.sum().item() for values, _ in spectra.values())
    if not total:
        raise EditsError("the edits change nothing: there is nothing to export")
    most = max(len(values) for values, _ in spectra.values())
    lost = [sum(values[r:].sum().item() for values, _ in spectra.values()) for r in range(most + 1)]
    if rank is None:
        rank = next(r for r in range(1, most + 1) if r == most or lost[r] <= TOLERANCE**2 * total)
    factors = {}
    for name, delta in deltas.items():
        b, a = best(delta, spectra[name][1][:, :rank])
        missing = rank - len(a)  # where a weight has fewer dimensions than the rank
        pair = nn.functional.pad(b, (0, missing)), nn.functional.pad(a, (0, 0, 0, missing))
        factors.update(dict.fromkeys(modules[name], pair))
    return Adapter(factors, (lost[min(rank, most)] / total) ** 0.5, any(transposed.values()))


def _modules(model: PreTrainedModel, name: str) -> list[str]:
    """The names of the modules whose weight is this parameter: one, or several that are tied.

    Raises:
        EditsError: something else than a linear map, or a module that has two names, of which PEFT adapts one.
    """
    parameter = model.get_parameter(name)
    found = [
        module
        for module, its in model.named_modules(remove_duplicate=False)
        if any(parameter is own for own in its._parameters.values())
    ]
    for module in found:
        kind = model.get_submodule(module)
        if not name.endswith(".weight") or not isinstance(kind, (nn.Linear, Conv1D)):
            raise EditsError(
                f"{name} belongs to {module}, a {type(kind).__name__}; an adapter is for linear maps: merge instead"
            )
    if len({id(model.get_submodule(module)) for module in found}) != len(found):
        raise EditsError(f"{' and '.join(found)} are one module, of which PEFT adapts one name alone: merge instead")
    return found


def _adding(b: Tensor, a: Tensor) -> Any:
    """A forward hook that adds B A x to a module's output, in float32 as PEFT does."""

    def hook(module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
        x = inputs[0].float()
        return output + (x @ a.T.to(x.device) @ b.T.to(x.device)).to(output.dtype)

    return hook
