"""``kdpo report``: runs side by side, as one page and one file of tables."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Makes one report, report.html and summary.md, of the runs in one or several folders; or of a sweep, done or not: methods ×
models, ranks, and a link to every run's report.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folders, and where to."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="what --metrics_save_dir named: runs, or one sweep"
    )
    parser.add_argument(
        "--metrics_save_dir",
        type=Path,
        metavar="DIR",
        help="a folder of its own for the report (default: report; of one run or sweep, its own)",
    )
    parser.add_argument("--latex", action="store_true", help="write the tables as summary.tex too")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Write the documents, and name them."""
    from ..report.documents import write_documents, write_sweep
    from ..report.sweep import is_sweep

    into = options.metrics_save_dir or (options.folders[0] if len(options.folders) == 1 else Path("report"))
    if sweeps := [folder for folder in options.folders if is_sweep(folder)]:
        if len(options.folders) > 1 or options.latex:
            parser.error(f"{sweeps[0]} is a sweep, which has a report of its own, without --latex; name it alone")
        files = write_sweep(sweeps[0], into)
    else:
        files = write_documents(options.folders, into, options.latex)
    for file in files:
        print(file)
    return 0
