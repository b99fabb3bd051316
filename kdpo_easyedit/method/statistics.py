"""Second moments of what projections are given, E[k kᵀ] over a text: for all layers in one pass, in EasyEdit's files.

A file is the ``.npz`` that EasyEdit's ``layer_stats`` writes and reads. The ``.json`` beside it says what the numbers are of:
which model's weights, which text, how many tokens. EasyEdit takes no notice of it; :func:`read` refuses another model's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..files import whole
from .replay import frozen, linear_by_onednn
from .weights import stored

LOG = logging.getLogger(__name__)

#: The most tokens a batch has, padding included; longer texts are cut to it.
BATCH_TOKENS = 2048

_SAVE_SECONDS = 60.0  # between two writings of the partial sums, which also take a twentieth of the time at most
# On a CPU, texts are put together up to so many tokens: more are no faster, and need more padding.
_TOGETHER_ON_CPU = 512
_BLOCK = 512  # rows of a sum that are added to at once
_SAMPLES = 4096  # numbers of a parameter that its fingerprint looks at
_CASTS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ANEW = "remove it, and have it made anew"

Fingerprint = Mapping[str, str]


class StatisticsError(ValueError):
    """Statistics that cannot be made or used; the message names the file or the value and says what to do."""


@dataclass(frozen=True)
class Text:
    """What statistics are taken over.

    Attributes:
        name: what it is called, such as the stem of a file's name.
        passages: the texts.
    """

    name: str
    passages: Sequence[str]

    @cached_property
    def sha256(self) -> str:
        """Of the passages, wherever one ends and the next begins."""
        digest = hashlib.sha256()
        for passage in self.passages:
            encoded = passage.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return digest.hexdigest()

    @property
    def dataset(self) -> str:
        """What EasyEdit is told as ``mom2_dataset``: no other text has this name."""
        name = re.sub(r"[^\w.]+|_", "-", self.name).strip("-.")[:40]
        return f"{name or 'text'}-{self.sha256[:8]}"


@dataclass(frozen=True)
class SecondMoment:
    """A second moment as a sum.

    Attributes:
        total: Σ k kᵀ; float64, ``[in, in]``, on the CPU.
        count: the number of k: the text's tokens, times the projection's runs a token where it has several.
    """

    total: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """E[k kᵀ]; float64, ``[in, in]``."""
        return self.total / self.count


@dataclass(frozen=True)
class Provenance:
    """What a file's numbers are of: the JSON beside it.

    Attributes:
        model: its name.
        layer: the projection's name.
        weights: :func:`fingerprints` of what is below the projection.
        text: its name.
        text_sha256: of its passages.
        texts: the number of passages.
        count: of tokens, as :class:`SecondMoment` counts.
        diagonal: SHA-256 of the file's own diagonal: a file that was replaced is not taken for the one described.
        version: the package's.
    """

    model: str
    layer: str
    weights: dict[str, str]
    text: str
    text_sha256: str
    texts: int
    count: int
    diagonal: str
    version: str


# --------------------------------------------------------------------------------------------------------------------
# Files.


def statistics_path(
    stats_dir: Path, model_name: str, layer_name: str, dataset: str, samples: int, dtype: str = "float32", release: bool = False
) -> Path:
    """Where EasyEdit keeps the second moment of a layer's input.

    Args:
        model_name: the model's ``name_or_path``.
        layer_name: the projection's name, without ``.weight``.
        dataset: a text's, of which :attr:`Text.dataset` is one.
        samples: the number of texts.
        release: EasyEdit's release names the folder by the model's whole path; its main branch by the last part of it.

    Raises:
        StatisticsError: the model has no name.
    """
    if not model_name:
        raise StatisticsError("the model's config.name_or_path is empty, and statistics are kept under it: set it to a name")
    folder = model_name.replace("/", "_") if release else model_name.rsplit("/")[-1]
    return Path(stats_dir) / folder / f"{dataset}_stats" / f"{layer_name}_{dtype}_mom2_{samples}.npz"


def statistics_files(model: Any, names: Sequence[str], hparams: Any) -> list[Path]:
    """The files of the second moments that KDPO+C needs, one a weight.

    Raises:
        StatisticsError: one is not there.
    """
    found = []
    for name in names:
        about = Path(hparams.stats_dir), model.config.name_or_path, name.removesuffix(".weight"), hparams.mom2_dataset
        files = [statistics_path(*about, hparams.mom2_n_samples, hparams.mom2_dtype, release) for release in (False, True)]
        there = next((file for file in files if file.is_file()), None)
        if there is None:
            raise StatisticsError(f"{files[0]}: there are no such statistics; `kdpo statistics` makes them from a text")
        found.append(there)
    return found


def make(
    model: Any,
    tok: Any,
    names: Sequence[str],
    text: Text,
    stats_dir: Path,
    *,
    dataset: str = "",
    samples: int = 0,
    dtype: str = "float32",
    release: bool = False,
    quiet: bool = False,
) -> dict[str, Path]:
    """The files of a text's second moments, by projection; those that are missing are made, all in one pass.

    A run that was stopped goes on where it last kept its sums, and gives the same numbers to the bit.

    Args:
        names: of the projections, without ``.weight``.
        text: what to take them over.
        dataset: the text's name in the files' names, where it has one that all agree on; left out, :attr:`Text.dataset`.
        samples: the number in the files' names, EasyEdit's ``mom2_n_samples``; left out, that of the texts.
        dtype: float32 or float64, of the numbers in the files.
        release: as in :func:`statistics_path`.
        quiet: show no progress.

    Raises:
        StatisticsError: as :func:`collect` and :func:`statistics_path`; or a file is there and is another model's.
    """
    samples = samples or len(text.passages)
    about = dataset or text.dataset, samples, dtype, release
    files = {name: statistics_path(stats_dir, model.config.name_or_path, name, *about) for name in names}
    weights = fingerprints(model, names)
    for name, file in files.items():
        if file.is_file():
            check(file, weights[name])
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        partial = files[missing[0]].with_name(f"unfinished_{dtype}_mom2_{samples}.safetensors")
        partial.parent.mkdir(parents=True, exist_ok=True)
        for name, moment in collect(model, tok, missing, text.passages, partial=partial, quiet=quiet).items():
            write(files[name], moment, model.config.name_or_path, name, weights[name], text, samples, dtype)
        partial.unlink(missing_ok=True)
    return files


def write(
    file: Path, moment: SecondMoment, model_name: str, name: str, weights: Fingerprint, text: Text, samples: int, dtype: str
) -> None:
    """Write a second moment as EasyEdit does, and beside it what it is of; each of the two whole or not at all."""
    total = moment.total.numpy().astype(dtype, copy=False)
    about = Provenance(
        model_name, name, dict(weights), text.name, text.sha256, len(text.passages), moment.count, _diagonal(total),
        version("kdpo-easyedit"),
    )  # fmt: skip
    # First what says of it: were it the last, a run stopped between the two would leave numbers that nothing is known of.
    with whole(_beside(file)) as unfinished:
        unfinished.write_text(json.dumps(asdict(about), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    arrays = {
        "mom2.constructor": np.array("easyeditor.util.runningstats.SecondMoment()"),
        "mom2.count": np.array(moment.count),
        "mom2.mom2": total,
        "sample_size": np.array(samples),
    }
    with whole(file) as unfinished, unfinished.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def read(file: Path, model: Any, name: str, weights: Fingerprint | None = None) -> Tensor:
    """E[k kᵀ] of what ``model``'s projection ``name`` is given: float64, ``[in, in]``.

    A file of which nothing is known, because EasyEdit made it, is taken, and the log says so.

    Args:
        weights: the projection's of :func:`fingerprints`, where they are known; they are to be taken before the model is
            edited below it.

    Raises:
        StatisticsError: it cannot be read, is of another shape, or of a model with other weights below the projection.
            Whether it is positive semidefinite is left to whoever factorises it.
    """
    about = check(file, weights or fingerprints(model, [name])[name])
    total, count = _arrays(file)
    if about and about.diagonal != _diagonal(total):
        raise StatisticsError(f"{file}: not the file that {_beside(file).name} beside it speaks of; remove both")
    width = _width(model, name)
    if total.shape != (width, width):
        raise StatisticsError(
            f"{file}: {list(total.shape)}, and {name} needs [{width}, {width}]: another model's? Name another stats_dir, or "
            + _ANEW
        )
    return _mean(file, total, count)


def check(file: Path, weights: Fingerprint) -> Provenance | None:
    """What is known of a file; None where nothing is, because EasyEdit made it, which the log says.

    Args:
        weights: of :func:`fingerprints`, of the projection.

    Raises:
        StatisticsError: it is of a model with other weights below the projection.
    """
    about = provenance(file)
    if about is None:
        LOG.warning("%s: nothing is known of the model and the text that it was made from; taken as it is", file)
    elif not any(
        about.weights.get(cast) == weights[cast] for cast in (about.weights.get("dtype", ""), weights["dtype"]) if cast
    ):
        raise StatisticsError(
            f"{file}: made for {about.model!r}, whose weights below {about.layer} are not this model's; "
            f"name another stats_dir, or {_ANEW}"
        )
    return about


def second_moment(file: Path) -> Tensor:
    """E[k kᵀ] of a layer's input k, from EasyEdit's file: float64, ``[in, in]``.

    Raises:
        StatisticsError: it cannot be read.
    """
    return _mean(file, *_arrays(file))


def provenance(file: Path) -> Provenance | None:
    """What is known of a file; None where nothing is.

    Raises:
        StatisticsError: what stands beside it cannot be read.
    """
    try:
        return Provenance(**json.loads(_beside(file).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise StatisticsError(f"{_beside(file)}: it does not say what {file.name} is of: {error}; remove both") from None


def _arrays(file: Path) -> tuple[np.ndarray, int]:
    """A file's sum, ``[in, in]``, and the number of keys in it."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            total, count = arrays["mom2.mom2"], int(arrays["mom2.count"])
    except FileNotFoundError:
        raise StatisticsError(f"{file}: there is no such file") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise StatisticsError(f"{file}: not a file of EasyEdit's statistics: {error}; {_ANEW}") from None
    if total.ndim != 2 or total.dtype.kind != "f" or count < 1:
        raise StatisticsError(f"{file}: a second moment of shape {list(total.shape)} over {count} tokens; {_ANEW}")
    return total, count


def _mean(file: Path, total: np.ndarray, count: int) -> Tensor:
    if not np.isfinite(total).all():
        raise StatisticsError(f"{file}: it holds numbers that are not finite; {_ANEW}")
    return torch.from_numpy(total).double().div_(count)


def _beside(file: Path) -> Path:
    return file.with_suffix(".json")


def _diagonal(total: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(total.diagonal()).tobytes()).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# The model below a projection.


def fingerprints(model: Any, names: Sequence[str]) -> dict[str, Fingerprint]:
    """What the model's weights below each projection are known by.

    Of every parameter that is used before the projection's last run, 4096 numbers at even distances are hashed, with its
    shape: a change of whole matrices, such as fine-tuning or an edit below makes, does not go unseen; one of single numbers,
    or of few rows of a large matrix, can. W itself and what stands above it or beside it is left out, so that editing W
    leaves its statistics what they are.

    Returns:
        By projection: ``dtype``, the model's, and a SHA-256 of the numbers in ``float32``, ``float16`` and ``bfloat16``: one
        model loaded in float32 and in half precision is the same one where the coarser of the two numbers agree.

    Raises:
        StatisticsError: a name is not of a projection, or it does not run.
    """
    return _walk(model, names)[0]


def _walk(model: Any, names: Sequence[str]) -> tuple[dict[str, Fingerprint], int]:
    """Fingerprints, and how many runs of the projections a forward pass has."""
    for name in names:
        _width(model, name)
    projections = {model.get_submodule(name): name for name in names}
    digests = {cast: hashlib.sha256() for cast in _CASTS}
    own = str(model.dtype).removeprefix("torch.")
    found: dict[str, Fingerprint] = {}
    used, runs = set(), 0

    def note(module: nn.Module, _args: Any) -> None:
        nonlocal runs
        if module in projections:
            runs += 1
            hashes = {cast: digest.hexdigest() for cast, digest in digests.items()}
            found[projections[module]] = {"dtype": own if own in _CASTS else "float32", **hashes}
        if module not in used:
            used.add(module)
            for key, _ in module.named_parameters(recurse=False):
                values = stored(module, key).detach().reshape(-1)  # type: ignore[union-attr]
                few = min(_SAMPLES, len(values))
                at = torch.arange(few, device=values.device) * (len(values) - 1) // max(few - 1, 1)
                values = values[at].float().cpu()
                for cast, digest in digests.items():
                    digest.update(f"{list(getattr(module, key).shape)}".encode())
                    digest.update(values.to(_CASTS[cast]).view(torch.uint8).numpy().data)

    with frozen(model), torch.no_grad(), ExitStack() as hooks:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.callback(module.register_forward_pre_hook(note).remove)
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=_device(model)), use_cache=False)
    if len(found) < len(projections):
        idle = next(name for name in names if name not in found)
        raise StatisticsError(f"{idle} does not run in a forward pass of text: it has no second moments")
    return found, runs


def _width(model: nn.Module, name: str) -> int:
    """The length of what a projection is given."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise StatisticsError(f"the model has no module {name!r}; rewrite_module_tmp and layers name it") from None
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0]
    kind = f"{type(module).__module__}.{type(module).__name__}"
    raise StatisticsError(f"{name} is a {kind}; second moments are taken of what an nn.Linear or a Conv1D is given")


def _device(model: Any) -> torch.device:
    """Where token numbers are looked up; for an offloaded model accelerate moves them."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


# --------------------------------------------------------------------------------------------------------------------
# The pass.


class _Done(Exception):
    """The highest projection has been given its input: nothing above is needed."""


class _Sums:
    """Σ k kᵀ of several projections: float32 products, added up in float32 on the projections' devices for some batches,
    and in float64 on the CPU over all, since not every device has float64. Both are ``[in, in]``, and symmetric: blocks below
    the diagonal are not added up."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        self.totals = {name: torch.zeros(width, width, dtype=torch.float64) for name, width in widths.items()}
        self.counts = dict.fromkeys(widths, 0)
        self._pending: dict[str, Tensor] = {}

    def add(self, name: str, keys: Tensor) -> None:
        """Keys ``[n, in]`` in the model's dtype."""
        keys = keys.float()
        width = keys.shape[1]
        if name not in self._pending:
            self._pending[name] = keys.new_zeros(width, width)
        for start in range(0, width, _BLOCK):
            rows = slice(start, start + _BLOCK)
            self._pending[name][rows, start:].addmm_(keys[:, rows].T, keys[:, start:])
        self.counts[name] += len(keys)

    def settle(self) -> None:
        """Bring what is pending to the CPU.

        Raises:
            StatisticsError: it is not finite.
        """
        for name, pending in self._pending.items():
            if not torch.isfinite(pending.diagonal()).all():
                raise StatisticsError(
                    f"what {name} is given is not finite, or its squares are not: load the model in float32 or bfloat16"
                )
            self.totals[name] += pending.cpu()
            pending.zero_()

    def moments(self) -> dict[str, SecondMoment]:
        """The sums, with the blocks below the diagonal."""
        for total in self.totals.values():
            for start in range(0, len(total), _BLOCK):
                end = start + _BLOCK
                total[end:, start:end] = total[start:end, end:].T
        return {name: SecondMoment(total, self.counts[name]) for name, total in self.totals.items()}

    @staticmethod
    def batches_between_settling(device: torch.device) -> int:
        """Fixed, since a resumed run is to add in the same order: from another device, the sums take longer than a batch."""
        return 4 if device.type == "cpu" else 64


def collect(
    model: Any,
    tok: Any,
    names: Sequence[str],
    texts: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    partial: Path | None = None,
    quiet: bool = False,
) -> dict[str, SecondMoment]:
    """E[k kᵀ] of what the named projections are given, in one pass over the texts that ends at the highest of them.

    Every token of a text counts once, with those that the tokenizer puts before it; an end token that it puts after every
    text does not, nor does padding. Texts are cut to ``batch_tokens`` and to the model's room.

    Memory, a projection with n inputs: 8 n² bytes on the CPU and 4 n² on its device; for Llama-3-8B's 14336, 1.64 GB and
    0.82 GB a layer. Beside it stand a batch's activations, and 4 n · ``batch_tokens`` bytes of keys: 0.12 GB.

    Args:
        model: a causal language model, in any dtype and mode; it is left as it was.
        tok: its tokenizer.
        names: of the projections, without ``.weight``: nn.Linear or Conv1D.
        texts: in any order; empty ones are left out.
        batch_tokens: the most tokens a batch has, padding included.
        partial: where sums are kept from time to time, for a run that is stopped to go on from. Nobody removes it when all is
            done.
        quiet: show no progress.

    Raises:
        StatisticsError: there is no text; a name is not of a projection, or it does not run once a token; or what it is given
            is not finite.
    """
    if batch_tokens < 1:
        raise StatisticsError(f"batch_tokens is {batch_tokens}; allowed: 1 and more, such as {BATCH_TOKENS}")
    sequences = _sequences(model, tok, texts, batch_tokens)
    device = _device(model)
    together = min(batch_tokens, _TOGETHER_ON_CPU) if device.type == "cpu" else batch_tokens
    batches = _batches([len(ids) for ids in sequences], together)
    weights, runs = _walk(model, names)
    identity = _identity(weights, batches, sequences, device)
    sums, done = _resume(partial, identity, {name: _width(model, name) for name in names})
    projections = {model.get_submodule(name): name for name in names}
    real = torch.empty(0)
    left = 0

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal left
        keys = args[0].reshape(-1, args[0].shape[-1])
        if len(keys) != real.numel():
            raise StatisticsError(f"{projections[module]} is given {len(keys)} vectors for {real.numel()} tokens, not one each")
        sums.add(projections[module], keys[real.to(keys.device)])
        left -= 1
        if not left:
            raise _Done

    saved, cost = time.monotonic(), 0.0
    with frozen(model), torch.no_grad(), ExitStack() as stack:
        stack.enter_context(linear_by_onednn(model))
        for module in projections:
            stack.callback(module.register_forward_pre_hook(take).remove)
        bar = stack.enter_context(
            tqdm(
                desc=f"second moments, {len(names)} layer{'s' * (len(names) > 1)}",
                total=sum(map(len, sequences)),
                initial=sum(len(sequences[i]) for batch in batches[:done] for i in batch),
                unit="token",
                unit_scale=True,
                file=sys.__stderr__,  # EasyEdit's output is sent elsewhere, and this is not its
                disable=quiet,
            )
        )
        for number, batch in enumerate(batches[done:], done + 1):
            ids, real = _padded([sequences[i] for i in batch])
            left = runs
            # No attention mask: in a causal model, the padding that follows a text does not reach it.
            with suppress(_Done):
                model(input_ids=ids.to(device), use_cache=False)
            bar.update(int(real.sum()))
            if number % sums.batches_between_settling(device) and number < len(batches):
                continue
            sums.settle()
            if partial is not None and time.monotonic() - saved > max(_SAVE_SECONDS, 20 * cost):
                began = time.monotonic()
                _save(partial, identity, sums, number)
                saved = time.monotonic()
                cost = saved - began
    return sums.moments()


def _sequences(model: Any, tok: Any, texts: Sequence[str], batch_tokens: int) -> list[np.ndarray]:
    """The texts' tokens, int32, cut to what a batch and the model have room for."""
    config = model.config.get_text_config()
    rooms = (
        getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
    )
    longest = min([batch_tokens, *(room for room in rooms if room)])
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise StatisticsError("there is no text to take second moments over: every passage is empty")
    special = tok(texts[0], return_special_tokens_mask=True)["special_tokens_mask"]
    appended = next((n for n, added in enumerate(reversed(special)) if not added), len(special))
    found = []
    for start in range(0, len(texts), 1000):
        encoded = tok(texts[start : start + 1000], truncation=True, max_length=longest)["input_ids"]
        found += [np.array(ids[: len(ids) - appended], dtype=np.int32) for ids in encoded]
    found = [ids for ids in found if len(ids)]
    if not found:
        raise StatisticsError("there is no text to take second moments over: no passage has a token")
    full = sum(len(ids) == longest - appended for ids in found)
    if full:
        LOG.info("%d of %d texts have %d tokens or more and were cut there", full, len(found), longest - appended)
    return found


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Texts of like length together, the longest first: were there no memory for a batch, it would be the first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def _padded(sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Tokens, int64 ``[B, L]``, and which of them are the texts', bool ``[B · L]``. Any token will do as padding."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    real = np.zeros(ids.shape, dtype=bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], real[row, : len(sequence)] = sequence, True
    return torch.from_numpy(ids), torch.from_numpy(real).flatten()


# --------------------------------------------------------------------------------------------------------------------
# A pass that was stopped.


def _identity(
    weights: Mapping[str, Fingerprint], batches: Sequence[Sequence[int]], sequences: Sequence[np.ndarray], device: torch.device
) -> str:
    """What must be the same for a pass to go on: everything that its sums depend on."""
    about = json.dumps([weights, batches, device.type, torch.__version__], sort_keys=True)
    digest = hashlib.sha256(about.encode())
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "big") + ids.tobytes())
    return digest.hexdigest()


def _save(partial: Path, identity: str, sums: _Sums, done: int) -> None:
    header = {"identity": identity, "done": str(done), "counts": json.dumps(sums.counts)}
    with whole(partial) as unfinished:
        save_file(sums.totals, unfinished, header)


def _resume(partial: Path | None, identity: str, widths: Mapping[str, int]) -> tuple[_Sums, int]:
    """The sums so far and the number of batches in them."""
    sums = _Sums(widths)
    if partial is None or not partial.is_file():
        return sums, 0
    try:
        with safe_open(partial, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("identity") == identity:
                for name in widths:
                    sums.totals[name] = file.get_tensor(name)
                sums.counts, done = json.loads(header["counts"]), int(header["done"])
                LOG.info("%s: going on after %d batches", partial, done)
                return sums, done
            reason = "of another model, text or set of layers"
    except (SafetensorError, OSError) as error:
        reason = f"it cannot be read ({error})"
    LOG.info("%s: begun anew, since the sums kept there are not to be used: %s", partial, reason)
    return _Sums(widths), 0
