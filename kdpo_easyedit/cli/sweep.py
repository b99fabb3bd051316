"""``kdpo sweep``: methods × models × data × protocols × sizes × seeds × orders, from one YAML."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

DESCRIPTION = """\
Runs every combination that a YAML names, each into a run's folder of its own, as `kdpo compare` makes it.
The same command goes on where it was stopped, and runs only what is missing.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The YAML, where to, and on what."""
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="what to run; docs/scale.md has its keys")
    parser.add_argument(
        "--metrics_save_dir", type=Path, default=Path("sweep"), metavar="DIR", help="the sweep's own folder (default: sweep)"
    )
    parser.add_argument("--dry_run", action="store_true", help="show the table of runs, and run nothing")
    parser.add_argument(
        "--easyedit_dir", metavar="DIR", help="a clone of EasyEdit (default: EASYEDIT_HOME, or the installed one)"
    )
    parser.add_argument("--device", help="of all cells: cpu, cuda, mps … (default: what the YAMLs say)")
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="a Ray cluster's: auto, for one that runs here, or its URL; local: one run after another in this process "
        "(default: a cluster of this machine's own where Ray is installed, else local)",
    )
    parser.add_argument(
        "--collect",
        action="store_true",
        help="machines of the cluster do not have this one's disk: send results through Ray",
    )
    parser.add_argument("--quiet", action="store_true", help="no table while it runs, for logs")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Show the plan, or run it; 1 where a cell failed, or none of its edits could be made."""
    from rich import live
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    # Importing the bench imports EasyEdit, which takes a moment; --help should not.
    from ..sweep.plan import check_devices, read_plan
    from ..sweep.progress import Live, plan_table
    from ..sweep.run import opened, refusals
    from ..sweep.run import run as run_sweep
    from ..sweep.tasks import connect, runs_here
    from ..sweep.work import read_summary

    transformers_logging.disable_progress_bar()
    console = Console(markup=False, highlight=False)
    plan = read_plan(options.sweep, options.device)
    if options.dry_run:
        console.print(plan_table(plan))
        console.print(f"{len(plan.cells)} runs, into {options.metrics_save_dir}", soft_wrap=True)
        if plan.refused:
            print(refusals(plan), file=sys.stderr)
        return 2 if plan.refused else 0
    check_devices(plan, here=runs_here(options.address))
    started = time.perf_counter()
    with opened(plan, options.metrics_save_dir) as sweep, connect(options.address, sweep.folder, options.collect) as workers:
        with suppress(shutil.SameFileError):  # of a sweep that is called again by its own copy
            shutil.copyfile(options.sweep, sweep.folder / "sweep.yaml")
        table = Live(sweep)
        errors = Console(stderr=True, markup=False, highlight=False)
        with live.Live(get_renderable=table.__rich__, console=errors, refresh_per_second=1, transient=True) as shown:
            if options.quiet:
                shown.stop()
            for event in run_sweep(sweep, workers):
                if event.state in ("again", "failed"):
                    more = "begun again" if event.state == "again" else "given up"
                    errors.print(f"{event.task.name}: {more} after try {event.tries}\n{event.error}", soft_wrap=True)
                elif options.quiet:
                    took = f" in {event.seconds:.1f} s" if event.state == "done" else f" by {event.where}"
                    loaded = ", of which a model was loaded" if event.loads else ""
                    errors.print(f"{event.task.name}: {event.state}{took}{loaded}", soft_wrap=True)
    failed = [cell for cell in sweep.cells.values() if cell.state == "failed"]
    for cell in failed:
        console.print(f"failed: {cell.name}\n{cell.error}", soft_wrap=True)
    done = [cell for cell in sweep.cells.values() if cell.state == "done"]
    empty = [cell for cell in done if any(row.none_made for row in read_summary(sweep.folder / cell.folder))]
    for cell in empty:
        console.print(f"no edit could be made: {cell.name}; {sweep.folder / cell.folder}/report.html says why", soft_wrap=True)
    loads = f", {sweep.loads} loads of a model for {sweep.ended} cells" if sweep.ended else ""
    console.print(
        f"{len(done)} of {len(sweep.cells)} runs are done{loads}; {time.perf_counter() - started:.0f} s; "
        f"everything is in {options.metrics_save_dir}",
        soft_wrap=True,
    )
    return 1 if failed or empty else 0
