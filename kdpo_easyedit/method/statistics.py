"""Second moments of what a projection is given, in EasyEdit's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch


class StatisticsError(ValueError):
    """Statistics that cannot be used; the message names the file and says what to do."""


def statistics_path(
    stats_dir: Path, model_name: str, layer_name: str, dataset: str, samples: int, dtype: str = "float32", release: bool = False
) -> Path:
    """Where EasyEdit keeps the second moment of a layer's input; the release names the folder by the model's whole path."""
    folder = model_name.replace("/", "_") if release else model_name.rsplit("/")[-1]
    return stats_dir / folder / f"{dataset}_stats" / f"{layer_name}_{dtype}_mom2_{samples}.npz"


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


def second_moment(file: Path) -> torch.Tensor:
    """E[k kᵀ] of a layer's input k, from EasyEdit's file: float64, ``[in, in]``.

    Raises:
        StatisticsError: it cannot be read.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            moment = torch.from_numpy(stored["mom2.mom2"]).double() / int(stored["mom2.count"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise StatisticsError(
            f"{file}: not a file of EasyEdit's statistics: {error}; remove it, and have it made anew"
        ) from None
    if not torch.isfinite(moment).all():
        raise StatisticsError(f"{file}: it holds numbers that are not finite; remove it, and have it made anew")
    return moment
