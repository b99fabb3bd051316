"""``kdpo report``: runs side by side, as one page and one file of tables."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = "Makes one report, report.html and summary.md, of the runs in one or several folders."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folders, and where to."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="what --metrics_save_dir named")
    parser.add_argument(
        "--metrics_save_dir",
        type=Path,
        metavar="DIR",
        help="a folder of its own for the report (default: report; of one run, that run's own)",
    )
    parser.add_argument("--latex", action="store_true", help="write the tables as summary.tex too")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Write the documents, and name them."""
    from ..report.documents import write_documents

    alone = options.folders[0] if len(options.folders) == 1 else Path("report")
    for file in write_documents(options.folders, options.metrics_save_dir or alone, options.latex):
        print(file)
    return 0
