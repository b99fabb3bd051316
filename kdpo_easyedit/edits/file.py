"""Edits as a file: one safetensors file that takes a model from before to after, and back, to the bit.

Of every edited weight the file holds either the difference of the numbers' bit patterns, taken as integers (format 1), since
differences of floating-point numbers are rounded, so that adding and subtracting one would not give the original back; or,
edit by edit, the factors of a low-rank change (format 2, :mod:`.factors`). A header says what model it is for, which edits it
makes, and how.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..files import whole
from ..method.config import KDPOHyperParams, plain
from ..method.weights import Weights, fingerprint, note_edit, read, write
from .factors import Changes, Factors, Residual, bits, from_tensors, to_tensors

LOG = logging.getLogger(__name__)

_HEADER = "kdpo_easyedit"
# The two parts of a residual, in the names of their tensors.
_SIZES = ("", "wide-")
# The dtypes that a float32 model is served in.
_COPIES = (torch.bfloat16, torch.float16)
# How many numbers of a weight that no edit is about tell whether it is still the same.
_SAMPLE = 4096


class EditsError(ValueError):
    """A file of edits that cannot be used on this model; the message says why."""


def one_by_one(model: PreTrainedModel, hparams: Any) -> bool:
    """Whether a method's edits of a model can be kept one by one: KDPO+C's, which add up where no rounding takes much away."""
    return isinstance(hparams, KDPOHyperParams) and hparams.mom2_adjustment and model.dtype == torch.float32


def save_edits(
    path: str | Path,
    model: nn.Module,
    originals: Weights,
    requests: Sequence[Mapping[str, Any]] = (),
    hparams: Any = None,
    license: str = "",
    changes: Sequence[Mapping[str, Factors]] | None = None,
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
        changes: of every request, what it added to the weights, by name: float32 ``[rows, r]`` and ``[r, columns]``, whose
            product is the change as the model stores the weight: of KDPO+C, its trace's ``factors``. They are then kept one by
            one, and take the room of their rank.

    Raises:
        EditsError: there are no originals, without which nothing can be taken back; a weight is not finite; or the changes are
            not what was changed. Nothing is written.
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
    header = {
        "format": 1 if changes is None else 2,
        "base_model": getattr(getattr(model, "config", None), "name_or_path", ""),
        "weights": {name: _about(original, edited[name]) for name, original in originals.items()},
        "others": samples_of(model, originals),
        "requests": [as_kept(request) for request in requests],
        "hparams": plain(hparams) if is_dataclass(hparams) else hparams,
        "versions": {name: version(name) for name in ("kdpo-easyedit", "torch", "transformers")},
        "license": license,
    }
    if changes is None:
        tensors = {name: bits(edited[name]) - bits(original) for name, original in originals.items()}
    else:
        tensors = _tensors(_checked(changes, originals, edited, len(requests)))
    _write(path, header, tensors)


def as_kept(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a file keeps of a request."""
    return {key: request[key] for key in ("prompt", "target_new", "subject", "context") if key in request}


def check_place(path: Path) -> None:
    """Whether a file of edits can be written there, before any edit is made.

    Raises:
        EditsError: it cannot.
    """
    if not os.access(path.absolute().parent, os.W_OK):
        raise EditsError(f"save_edits is {str(path)!r}, whose folder is not there or cannot be written; name another file")
    if path.is_dir():
        raise EditsError(f"save_edits is {str(path)!r}, which is a folder; name a file in it")


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a file of edits: ``base_model``, ``weights``, ``requests``, ``hparams``, ``versions``, ``license``.

    Raises:
        EditsError: there is no such file, or it is no file of edits.
    """
    with _opened(path) as (_, header):
        return header


def apply_edits(model: nn.Module, path: str | Path, cast: bool = False) -> None:
    """Make a file's edits in a model.

    Where other weights of the model than the edited ones have changed since, the log says so.

    Args:
        model: with the weights that the edits were made on.
        path: of the file.
        cast: allow edits of a float32 model to be made on its copy in bfloat16 or float16. They are rounded then, which the
            log says, and only the original in float32 can tell by how much; the file cannot take them back.

    Raises:
        EditsError: the model does not have the very weights that the edits were made on; it is left alone.
    """
    _apply(model, path, cast, None)


def revert_edits(model: nn.Module, path: str | Path) -> None:
    """Take a file's edits back; the weights are then what they were, to the bit. Of several files, the last comes first.

    Raises:
        EditsError: the model does not have the very weights that the edits led to; it is left alone.
    """
    edits = _load(path)
    weights = _weights(model, edits, "after")
    _replace(model, weights, {name: edits.before(name, weight) for name, weight in weights.items()})


@contextmanager
def edits_applied(
    model: nn.Module, path: str | Path, cast: bool = False, only: Collection[int] | None = None
) -> Iterator[None]:
    """For a block, let the model have a file's edits. Whatever is done to the edited weights inside ends with it.

    Args:
        model, path, cast: as :func:`apply_edits`.
        only: some of the edits, counted from 1 as ``kdpo edits list`` does, of a file that keeps them one by one.

    Raises:
        EditsError: as :func:`apply_edits`; the file has no such edits, or does not keep them one by one.
    """
    originals = _apply(model, path, cast, only)
    try:
        yield
    finally:
        write(model, originals)


def changes_made(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """What a file's edits add to a model's weights, by name, as the model stores them: float64, on the CPU.

    Where the file keeps low-rank changes, these are their sum, before it is rounded to the weights' dtype.

    Raises:
        EditsError: the model does not have the very weights that the edits were made on.
    """
    edits = _load(path)
    weights = _weights(model, edits, "before")
    return {
        name: edits.changes[name].sum(weight)
        if name in edits.changes
        else edits.after(name, weight).double() - weight.cpu().double()
        for name, weight in weights.items()
    }


def read_changes(path: str | Path) -> list[dict[str, Factors]]:
    """Of every edit of a file what :func:`save_edits` was given as its change.

    Raises:
        EditsError: the file keeps its edits as one change.
    """
    edits = _load(path)
    edits.check_numbers([])
    numbers = range(len(edits.header["requests"]))
    return [{name: pair for name, its in edits.changes.items() if (pair := its.factors[n])} for n in numbers]


def remove_edit(path: str | Path, number: int, model: nn.Module) -> None:
    """Take one edit out of a file that keeps them one by one; the others' changes stay as they are.

    Args:
        path: of the file, which is replaced.
        number: of the edit, counted from 1.
        model: with the weights that the edits were made on; left as it is.

    Raises:
        EditsError: there is no such edit, it is the only one, the edits are not kept one by one, or another model.
    """
    edits = _load(path)
    edits.check_numbers([number])
    if len(edits.header["requests"]) == 1:
        raise EditsError(f"{path}: edit 1 is the only one; to be without it, do without the file")
    weights = _weights(model, edits, "before")
    left = {
        name: Changes.of(weights[name], [pair for at, pair in enumerate(changes.factors, 1) if at != number])
        for name, changes in edits.changes.items()
    }
    header = edits.header
    header["requests"].pop(number - 1)
    for name, weight in weights.items():
        header["weights"][name]["after"] = fingerprint(left[name].after(weight))
    _write(path, header, _tensors(left))


# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Edits:
    """A file of edits.

    Attributes:
        differences: by name, of bit patterns; empty in format 2.
        changes: by name; empty in format 1.
    """

    path: str | Path
    header: dict[str, Any]
    differences: dict[str, Tensor]
    changes: dict[str, Changes]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """A weight's; None where no edit has changed it, and the file does not tell."""
        if name in self.differences:
            return tuple(self.differences[name].shape)
        pair = next((pair for pair in self.changes[name].factors if pair), None)
        return pair and (len(pair[0]), pair[1].shape[1])

    def after(self, name: str, weight: Tensor, only: Collection[int] | None = None) -> Tensor:
        if name in self.changes:
            return self.changes[name].after(weight, only)
        return (bits(weight) + self.differences[name]).view(weight.dtype)

    def before(self, name: str, weight: Tensor) -> Tensor:
        if name in self.changes:
            return self.changes[name].before(weight)
        return (bits(weight) - self.differences[name]).view(weight.dtype)

    def check_numbers(self, numbers: Collection[int]) -> None:
        """Whether there are edits of these numbers, each by itself.

        Raises:
            EditsError: there are not.
        """
        count = len(self.header["requests"])
        if not self.changes:
            raise EditsError(
                f"{self.path}: keeps its edits as one change, since each was made where the last had left the weights; "
                "one is told apart only where changes add, as KDPO+C's do, and were saved one by one: save_edits(…, changes=…)"
            )
        for number in numbers:
            if not 1 <= number <= count:
                raise EditsError(f"{self.path}: there is no edit {number}; there are 1 to {count}")


def _apply(model: nn.Module, path: str | Path, cast: bool, only: Collection[int] | None) -> dict[str, Tensor]:
    """Make a file's edits; returns the weights as they were."""
    edits = _load(path)
    if only is not None:
        edits.check_numbers(only)
    weights = _weights(model, edits, "before", cast)
    shifted = {}
    for name, weight in weights.items():
        if str(weight.dtype) == edits.header["weights"][name]["dtype"]:
            shifted[name] = edits.after(name, weight, only)
            continue
        LOG.warning(
            "%s: the edits of %s were made in %s, and are rounded to %s; by how much, only the original can tell",
            path, name, edits.header["weights"][name]["dtype"], weight.dtype,
        )  # fmt: skip
        # The copy's bit patterns are off by less than the rounding, but around 0 they can become one that is no number.
        rounded = edits.after(name, weight.float(), only).nan_to_num(0, torch.inf, -torch.inf).to(weight.dtype)
        if not torch.isfinite(rounded).all():
            raise EditsError(f"{path}: {name} would have numbers beyond those of {weight.dtype}")
        shifted[name] = rounded
    if changed := _changed_others(model, edits.header):
        LOG.warning(
            "%s: %d weights that the edits are not about differ from those of %s, %s among them; check that the edits hold",
            path, len(changed), edits.header["base_model"], changed[0],
        )  # fmt: skip
    originals = {name: weight.clone() for name, weight in weights.items()}
    _replace(model, weights, shifted)
    note_edit(model, originals, shifted)
    return originals


def _replace(model: nn.Module, weights: Weights, others: Weights) -> None:
    """Write the others, all or, where something comes between, none."""
    originals = {name: weight.clone() for name, weight in weights.items()}
    try:
        write(model, others)
    except BaseException:
        write(model, originals)
        raise


def _weights(model: nn.Module, edits: _Edits, expected: str, cast: bool = False) -> dict[str, Tensor]:
    """The model's weights that the edits are of.

    Raises:
        EditsError: they are not what they are expected to be.
    """
    path, header = edits.path, edits.header
    names = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in header["weights"] if name not in names]
    if missing:
        raise EditsError(f"{path}: made on {header['base_model']!r}; this model has no {missing[0]}")
    weights = read(model, header["weights"])
    for name, weight in weights.items():
        about = header["weights"][name]
        there, here = about["dtype"], str(weight.dtype)
        copies = about.get("copies", {}) if expected == "before" else {}
        shape, own = edits.shape(name) or tuple(weight.shape), tuple(weight.shape)
        if shape != own or (there != here and here not in copies):
            raise EditsError(
                f"{path}: {name} was {there} {list(shape)} when the edits were made, and is {here} {list(own)} here"
            )
        own_print = fingerprint(weight)
        if there != here and own_print == copies[here]:
            if not cast:
                raise EditsError(
                    f"{path}: {name} was {there} when the edits were made, and is its {here} copy here; "
                    "to have the edits rounded to that, ask for it: cast=True, or --cast"
                )
        elif there != here:
            raise EditsError(
                f"{path}: {name} was {there} when the edits were made, and is {here} here, "
                f"but is no copy of the weight that the edits were made on ({header['base_model']!r})"
            )
        elif own_print != about[expected]:
            if of_copy := [kind for kind in _COPIES if fingerprint(weight.to(kind)) == copies.get(str(kind))]:
                raise EditsError(
                    f"{path}: {name} is a {of_copy[0]} copy of the original; load it in that dtype, and ask for a cast"
                )
            state = "that the edits were made on" if expected == "before" else "that the edits led to"
            raise EditsError(
                f"{path}: {name} is not the weight {state} ({header['base_model']!r}); "
                "of several files, apply them in the order they were made in, and take them off in reverse"
            )
    return weights


def _about(before: Tensor, after: Tensor) -> dict[str, Any]:
    """What the header says of a weight; of a float32 one also the fingerprints of its copies."""
    about: dict[str, Any] = {"before": fingerprint(before), "after": fingerprint(after), "dtype": str(before.dtype)}
    if before.dtype == torch.float32:
        about["copies"] = {str(kind): fingerprint(before.to(kind)) for kind in _COPIES}
    return about


def samples_of(model: nn.Module, but: Collection[str] = ()) -> dict[str, str]:
    """Of every parameter but some, its dtype and a fingerprint of a sample of its numbers."""
    ours = [model.get_parameter(name) for name in but]
    names = [name for name, parameter in model.named_parameters() if not any(parameter is own for own in ours)]
    found = {}
    for name, weight in read(model, names).items():
        flat = weight.reshape(-1)
        found[name] = f"{weight.dtype} {fingerprint(flat[:: max(1, len(flat) // _SAMPLE)])[:16]}"
    return found


def _changed_others(model: nn.Module, header: Mapping[str, Any]) -> list[str]:
    """The weights that no edit is about and that are not what they were; in another dtype they are not compared."""
    were = header.get("others", {})
    now = samples_of(model, header["weights"]) if were else {}
    same_kind = [name for name in were.keys() & now.keys() if were[name].split()[0] == now[name].split()[0]]
    return sorted(name for name in same_kind if were[name] != now[name])


def _checked(
    changes: Sequence[Mapping[str, Factors]], originals: Weights, edited: Weights, requests: int
) -> dict[str, Changes]:
    """Changes by weight.

    Raises:
        EditsError: they are not what was changed.
    """
    if len(changes) != requests:
        raise EditsError(f"changes are {len(changes)}, and requests {requests}; allowed: one of each an edit")
    found = {}
    for name, before in originals.items():
        factors = [tuple(f.detach().float().cpu().contiguous() for f in its[name]) if name in its else None for its in changes]
        for number, pair in enumerate(factors, 1):
            if pair and (len(pair[0]), pair[1].shape[1]) != tuple(before.shape):
                shape = [len(pair[0]), pair[1].shape[1]]
                raise EditsError(f"the change of edit {number} is {shape} as a product, and {name} {list(before.shape)}")
        after = edited[name].cpu()
        found[name] = Changes.of(before.cpu(), factors, after)  # type: ignore[arg-type]
        off = (found[name].made.added_to(after.clone(), -1).double() - after.double()).norm()
        if off > 0.01 * (after.double() - before.cpu().double()).norm():
            raise EditsError(f"changes do not add up to what the edits have changed in {name}")
    return found


def _tensors(changes: Mapping[str, Changes]) -> dict[str, Tensor]:
    """Changes as the tensors of a file."""
    edits = len(next(iter(changes.values())).factors)
    of_each = [{name: pair for name, its in changes.items() if (pair := its.factors[n])} for n in range(edits)]
    tensors = to_tensors(of_each)
    for name, its in changes.items():
        for key, residual in (("made", its.made), ("lost", its.lost)):
            for size, (gaps, by) in zip(_SIZES, residual.parts):
                tensors[f"{key}:{name}:{size}gaps"], tensors[f"{key}:{name}:{size}by"] = gaps, by
    return tensors


def _write(path: str | Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    header["tensors"] = _digest(tensors)
    try:
        with whole(Path(path)) as unfinished:
            save_file(tensors, unfinished, {_HEADER: json.dumps(header, default=str, ensure_ascii=False)})
    except SafetensorError as error:  # which is no OSError, whatever the system said
        raise EditsError(f"{path}: cannot be written: {error}") from None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 of what a file holds beside its header."""
    each = [f"{name} {tensor.dtype} {fingerprint(tensor)}" for name, tensor in sorted(tensors.items())]
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A file of edits, open, and its header.

    Raises:
        EditsError: there is no such file, or it is no file of edits, as which whatever goes wrong inside counts.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            if header.get("format", 1) not in (1, 2):
                raise EditsError(f"{path}: edits in format {header['format']}, which a later version of this package writes")
            yield file, header
    except EditsError:
        raise
    except FileNotFoundError:
        raise EditsError(f"{path}: there is no such file") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise EditsError(f"{path}: not a file of edits: {error}") from None


def _load(path: str | Path) -> _Edits:
    with _opened(path) as (file, header):
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header.get("tensors", digest := _digest(tensors)) != digest:  # older files have none
            raise EditsError(f"{path}: its numbers are not those that were written; take another copy of the file")
        if header.get("format", 1) == 1:
            return _Edits(path, header, {name: tensors[name] for name in header["weights"]}, {})
        of_each = from_tensors(tensors, header["weights"], len(header["requests"]))
        return _Edits(path, header, {}, {name: _changes(name, of_each, tensors) for name in header["weights"]})


def _changes(name: str, of_each: Sequence[Mapping[str, Factors]], tensors: Mapping[str, Tensor]) -> Changes:
    def residual(key: str) -> Residual:
        none = torch.empty(0, dtype=torch.int8)  # older files have all in one part
        gaps, by = ([tensors.get(f"{key}:{name}:{size}{what}", none) for size in _SIZES] for what in ("gaps", "by"))
        return Residual(((gaps[0], by[0]), (gaps[1], by[1])))

    made, lost = residual("made"), residual("lost")
    return Changes([its.get(name) for its in of_each], made, lost)
