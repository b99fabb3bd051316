"""Second moments by EasyEdit's own code, where its methods look for them."""

from __future__ import annotations

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

from ..method.statistics import statistics_path
from ..models import world
from .host import IS_RELEASE, HostError, submodule
from .hparams import filled_in

statistics_file: Callable[..., Path] = partial(statistics_path, release=IS_RELEASE)


def build_world(recipe: world.Recipe = world.RECIPES[world.NAME], quiet: bool = False) -> world.World:
    """The world of :func:`kdpo_easyedit.world.build`, with covariance statistics where EasyEdit's MEMIT looks for them.

    Raises:
        WorldError, OSError: as :func:`kdpo_easyedit.world.build`.
    """
    built = world.build(recipe, quiet)
    names = [f"transformer.h.{layer}.mlp.c_proj" for layer in range(recipe.layers)]
    files = [statistics_file(built.statistics, str(built.folder), name, world.NAME, recipe.samples) for name in names]
    missing = [name for name, file in zip(names, files) if not file.is_file()]
    if missing:
        model = AutoModelForCausalLM.from_pretrained(built.folder)
        tok = AutoTokenizer.from_pretrained(built.folder)
        for name in tqdm(missing, desc="covariance statistics of the world", unit="layer", disable=quiet):
            compute_statistics(model, tok, name, built.statistics, world.NAME, recipe.samples, texts=built.passages())
    return built


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
    hparams = filled_in(hparams, model)
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
