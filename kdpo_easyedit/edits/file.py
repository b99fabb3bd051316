"""Edits as a file: one safetensors file that takes a model from before to after, and back, to the bit.

The file holds, for every edited weight, the difference of the numbers' bit patterns, taken as integers: differences of
floating-point numbers are rounded, so that adding and subtracting one would not give the original back. A header says what
model it is for, which edits it makes, and how.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import whole
from ..method.weights import Weights, fingerprint, note_edit, read, write

_HEADER = "kdpo_easyedit"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class EditsError(ValueError):
    """A file of edits that cannot be used on this model; the message says why."""


def save_edits(
    path: str | Path,
    model: nn.Module,
    originals: Weights,
    requests: Sequence[Mapping[str, Any]] = (),
    hparams: Any = None,
    license: str = "",
) -> None:
    """Write what edits have changed in a model.

    Args:
        path: of the file to write.
        model: the edited model.
        originals: the edited weights as they were, by name: what ``apply_kdpo_to_model(…, return_orig_weights=True)``
            returned before the first edit.
        requests: the edits.
        hparams: how they were made: a dataclass or a mapping.
        license: under which the file may be used.

    Raises:
        EditsError: there are no originals, without which nothing can be taken back, or a weight is not finite; nothing is
            written.
    """
    if not originals:
        raise EditsError(
            "originals is empty, and edits that are saved without them cannot be taken back: "
            "have apply_kdpo_to_model return them, by return_orig_weights=True"
        )
    edited = read(model, originals)
    for state, weights in (("before", originals), ("after", edited)):
        for name, weight in weights.items():
            if not torch.isfinite(weight).all():
                raise EditsError(f"{name} holds numbers that are not finite {state} the edits: nothing is saved")
    differences = {name: _bits(edited[name]) - _bits(original) for name, original in originals.items()}
    header = {
        "base_model": getattr(getattr(model, "config", None), "name_or_path", ""),
        "weights": {
            name: {"before": fingerprint(original), "after": fingerprint(edited[name]), "dtype": str(original.dtype)}
            for name, original in originals.items()
        },
        "requests": [
            {key: request[key] for key in ("prompt", "target_new", "subject") if key in request} for request in requests
        ],
        "hparams": asdict(hparams) if is_dataclass(hparams) and not isinstance(hparams, type) else hparams,
        "versions": {name: version(name) for name in ("kdpo-easyedit", "torch", "transformers")},
        "license": license,
    }
    with whole(Path(path)) as unfinished:
        save_file(differences, unfinished, {_HEADER: json.dumps(header, default=str, ensure_ascii=False)})


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a file of edits: ``base_model``, ``weights``, ``requests``, ``hparams``, ``versions``, ``license``.

    Raises:
        EditsError: there is no such file, or it is no file of edits.
    """
    return _load(path)[0]


def apply_edits(model: nn.Module, path: str | Path) -> None:
    """Make a file's edits in a model.

    Raises:
        EditsError: the model does not have the very weights that the edits were made on; it is left alone.
    """
    _shift(model, path, "before", 1)


def revert_edits(model: nn.Module, path: str | Path) -> None:
    """Take a file's edits back; the weights are then what they were, to the bit. Of several files, the last comes first.

    Raises:
        EditsError: the model does not have the very weights that the edits led to; it is left alone.
    """
    _shift(model, path, "after", -1)


@contextmanager
def edits_applied(model: nn.Module, path: str | Path) -> Iterator[None]:
    """For a block, let the model have a file's edits.

    Raises:
        EditsError: as :func:`apply_edits`.
    """
    apply_edits(model, path)
    try:
        yield
    finally:
        revert_edits(model, path)


def _bits(weight: Tensor) -> Tensor:
    """A weight's bit patterns as integers of the same size, on the CPU. Their sums wrap around, and so are exact."""
    return weight.detach().cpu().contiguous().view(_INTEGERS[weight.element_size()])


def _shift(model: nn.Module, path: str | Path, expected: str, sign: int) -> None:
    header, differences = _load(path)
    names = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in header["weights"] if name not in names]
    if missing:
        raise EditsError(f"{path}: made on {header['base_model']!r}; this model has no {missing[0]}")
    weights = read(model, header["weights"])
    for name, weight in weights.items():
        there, here = header["weights"][name]["dtype"], str(weight.dtype)
        if there != here or differences[name].shape != weight.shape:
            shape, own = list(differences[name].shape), list(weight.shape)
            raise EditsError(f"{path}: {name} was {there} {shape} when the edits were made, and is {here} {own} here")
        if fingerprint(weight) != header["weights"][name][expected]:
            state = "that the edits were made on" if expected == "before" else "that the edits led to"
            raise EditsError(
                f"{path}: {name} is not the weight {state} ({header['base_model']!r}); "
                "of several files, apply them in the order they were made in, and take them off in reverse"
            )
    shifted = {name: (_bits(weight) + sign * differences[name]).view(weight.dtype) for name, weight in weights.items()}
    originals = {name: weight.clone() for name, weight in weights.items()}
    try:
        write(model, shifted)
    except BaseException:
        write(model, originals)
        raise
    if sign > 0:
        note_edit(model, originals, shifted)


def _load(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            return header, {name: file.get_tensor(name) for name in header["weights"]}
    except FileNotFoundError:
        raise EditsError(f"{path}: there is no such file") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise EditsError(f"{path}: not a file of edits: {error}") from None
