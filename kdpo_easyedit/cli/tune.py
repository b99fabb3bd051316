"""``kdpo tune``: settings for methods, chosen on edits that are not reported, with the same budget for each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .flags import add_machine, add_methods, model_name

if TYPE_CHECKING:
    from rich.table import Table

    from ..sweep.tuning import Tuned, Tuning

DESCRIPTION = """\
Gives every method the same number of trials on development edits, which are not those that are reported, and writes the
best settings of each as a YAML. The first trial has the present settings. A trial's score is the mean of edit success,
generalization, locality and portability, over single and sequential edits. Needs Optuna: pip install -e '.[tune]'.
The same command goes on where it was stopped; with a larger --trials, it adds trials.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The methods, the budget, the edits, and where the YAMLs go."""
    what = parser.add_argument_group("what to tune")
    add_methods(what, "KDPO")
    what.add_argument("--trials", type=int, default=20, metavar="N", help="of every method, failed ones included (default: 20)")
    what.add_argument(
        "--protocols",
        nargs="+",
        choices=("single", "sequential"),
        default=["single", "sequential"],
        help="which edits a trial makes; its score is the mean over them (default: both)",
    )
    what.add_argument(
        "--at_once",
        type=int,
        default=1,
        metavar="K",
        help="choose so many trials of a method together: they may run side by side, and know less of one another (default: 1)",
    )
    data = parser.add_argument_group("the edits")
    data.add_argument(
        "--data_dir", metavar="FILE", help="a benchmark file (default: the development edits that come with the model)"
    )
    data.add_argument("--datatype", metavar="LAYOUT", help="its layout, as for kdpo compare")
    data.add_argument(
        "--reported",
        type=int,
        metavar="N",
        help="how many edits from the start of --data_dir are reported, and so left out; 0 where the file has none of them",
    )
    data.add_argument("--ds_size", type=int, metavar="N", help="how many edits to take (default: 40, or all there are)")
    data.add_argument("--stats_text", metavar="FILE", help="a text, a passage a line, for second moments")
    data.add_argument(
        "--ability_text", metavar="FILE", help="ordinary text, a passage a line, for perplexity after the sequence"
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--metrics_save_dir", type=Path, default=Path("tune"), metavar="DIR", help="the studies' own folder (default: tune)"
    )
    where.add_argument(
        "--save_hparams",
        type=Path,
        metavar="DIR",
        help="the YAMLs go into DIR/METHOD/NAME.yaml (default: hparams in the studies' folder)",
    )
    where.add_argument("--overwrite", action="store_true", help="write over YAMLs that are there")
    where.add_argument(
        "--address",
        default="local",
        metavar="ADDRESS",
        help="a Ray cluster's: auto, for one that runs here, or its URL: methods, and trials chosen together, side by side "
        "(default: local, one trial after another in this process)",
    )
    where.add_argument("--collect", action="store_true", help="machines of the cluster do not have this one's disk")
    where.add_argument(
        "--num_gpus",
        type=float,
        metavar="N",
        help="of a trial on a cluster; fractions share one (default: 1 where it is on CUDA)",
    )
    add_machine(where)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Tune, and show what was found; 1 where all trials of a method failed."""
    for flag in ("trials", "at_once", "ds_size"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            parser.error(f"--{flag} is {getattr(options, flag)}; allowed: a whole number, 1 or above")
    if options.data_dir and options.reported is None:
        parser.error("--reported is missing: how many edits from the start of --data_dir are reported? They are left out")
    from rich.console import Console
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from ..sweep.tasks import connect
    from ..sweep.tuning import tune

    started, console = time.perf_counter(), Console(markup=False, highlight=False)
    methods = list(dict.fromkeys(options.editing_method or ["KDPO"]))
    tuning = _tuning(options, methods)
    finished: dict[str, int] = {}
    with (
        connect(options.address, options.metrics_save_dir.resolve(), options.collect) as workers,
        tqdm(total=len(methods) * options.trials, unit="trial", disable=options.quiet, dynamic_ncols=True) as bar,
    ):

        def progress(found: Tuned) -> None:
            new = found.trials - finished.get(found.method, 0)
            if found.method not in finished:  # done by an earlier call
                bar.initial = getattr(bar, "initial", 0) + new  # a quiet one has none
            finished[found.method] = found.trials
            if found.best is not None:
                bar.set_postfix_str(f"{found.method}: {found.best:.1f}, at first {_shown(found.present)}", refresh=False)
            bar.update(new)

        tuned = tune(
            methods,
            tuning,
            options.metrics_save_dir,
            workers,
            options.save_hparams,
            options.overwrite,
            options.num_gpus,
            progress,
        )
    console.print(_table(tuned))
    for found in tuned:
        if found.file is None:
            console.print(f"{found.method}: all trials failed, the last one with {found.error}", soft_wrap=True)
        else:
            changed = ", ".join(f"{name} {value}" for name, value in found.changed.items()) or "nothing better than at first"
            console.print(f"{found.method}: {changed}\n  {found.file}", soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} s; the studies are in {options.metrics_save_dir}", soft_wrap=True)
    return 1 if any(found.file is None for found in tuned) else 0


def _tuning(options: argparse.Namespace, methods: Sequence[str]) -> Tuning:
    from ..bench.inputs import need_subject
    from ..easyedit.hparams import load_hparams
    from ..sweep.development import read_development
    from ..sweep.tuning import Tuning

    all_hparams = [load_hparams(method, model_name(options)) for method in methods]
    inputs = read_development(
        options.hparams_dir,
        all_hparams[0].model_name,
        options.data_dir,
        options.datatype,
        options.reported or 0,
        options.ds_size,
        need_subject(all_hparams),
        options.stats_text,
        options.ability_text,
        options.quiet,
    )
    return Tuning(
        options.hparams_dir,
        inputs.requests,
        inputs.data_name,
        options.protocols,
        options.trials,
        options.seed,
        options.at_once,
        inputs.stats_text,
        inputs.ability_texts,
        options.device,
        options.dtype,
    )


def _table(tuned: Sequence[Tuned]) -> Table:
    """A row a method: how good the settings were at first, and are now."""
    from rich.table import Table

    table = Table("method")
    protocols = list(dict.fromkeys(row.protocol for found in tuned for row in found.rows))
    for heading in ("trials", "failed", "at first", "best", *(f"{protocol}\nmean" for protocol in protocols)):
        table.add_column(heading, justify="right")
    for found in tuned:
        means = {row.protocol: row.mean for row in found.rows}
        table.add_row(
            found.method,
            str(found.trials),
            str(found.failed),
            _shown(found.present),
            _shown(found.best),
            *(_shown(means.get(protocol)) for protocol in protocols),
        )
    return table


def _shown(score: float | None) -> str:
    return "–" if score is None else f"{score:.2f}"
