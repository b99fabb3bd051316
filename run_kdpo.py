"""Compare knowledge editing methods on a model, with KDPO among them. See --help."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

_DESCRIPTION = """\
Edits facts in a language model with KDPO and other methods of EasyEdit, measures each with EasyEdit's
metrics, and prints a table a protocol: edit success, generalization, portability, locality, fluency.

Without arguments it edits a small model that is trained here, the first time, to know an invented world.
"""
_EXAMPLES = """\
examples:
  python run_kdpo.py
  python run_kdpo.py --editing_method KDPO FT ROME MEMIT --sequential_edit --ds_size 100 --metrics_save_dir hundred
  python run_kdpo.py --hparams_dir qwen1.5-0.5b --data_dir ZsRE-test-all.json --ds_size 100 --device cuda:0
  python run_kdpo.py report output hundred --metrics_save_dir both    (see report --help)
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--editing_method",
        nargs="+",
        metavar="METHOD",
        help="methods to compare, each with its YAML in hparams/METHOD/ (default: KDPO FT ROME MEMIT for the world, else KDPO)",
    )
    what.add_argument(
        "--hparams_dir",
        default="world",
        metavar="NAME",
        help="a model's short name, such as qwen1.5-0.5b, looked up as hparams/METHOD/NAME.yaml; "
        "or, for one method, the path of a YAML (default: world, the model that is trained here)",
    )
    what.add_argument(
        "--sequential_edit",
        action="store_true",
        help="sequential edits only, measured on the final model (default: single edits; for the world, both)",
    )
    what.add_argument(
        "--eval_at",
        nargs="+",
        type=int,
        metavar="N",
        help="after how many sequential edits to measure all of them so far (default: powers of ten, and the end)",
    )
    data = parser.add_argument_group("the edits")
    data.add_argument("--data_dir", metavar="FILE", help="a benchmark file (default: the world's own)")
    data.add_argument(
        "--datatype",
        metavar="LAYOUT",
        help="its layout: knowedit (also as zsre, recent or counterfact), wikibio, zsre_mend, counterfact_rome, flat "
        "(default: seen from its keys)",
    )
    data.add_argument("--ds_size", type=int, metavar="N", help="how many records to take (default: all; of the world's, 20)")
    data.add_argument("--shuffle", action="store_true", help="take the records in random order, by --seed")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--metrics_save_dir",
        default="output",
        metavar="DIR",
        help="the run's own folder; the same command goes on in it where it was stopped (default: output)",
    )
    where.add_argument("--latex", action="store_true", help="write the tables as summary.tex too")
    where.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    where.add_argument(
        "--save_edits", metavar="FILE", help="keep the sequential edits of one method as a file, for kdpo_easyedit.apply_edits"
    )
    where.add_argument(
        "--save_model", metavar="DIR", help="keep the model with the sequential edits of one method, for from_pretrained"
    )
    where.add_argument(
        "--easyedit_dir", metavar="DIR", help="a clone of EasyEdit (default: EASYEDIT_HOME, or the installed one)"
    )
    where.add_argument("--device", help="cpu, cuda:0, mps … (default: what the YAML says)")
    where.add_argument("--seed", type=int, default=0, help="of all sampling (default: 0)")
    where.add_argument("--quiet", action="store_true", help="no progress bars, for logs")
    options = parser.parse_args(arguments)
    if options.ds_size is not None and options.ds_size < 1:
        parser.error(f"--ds_size is {options.ds_size}; allowed: a whole number, 1 or above")
    if min(options.eval_at or [1]) < 1:
        parser.error(f"--eval_at is {options.eval_at}; allowed: whole numbers, 1 or above")
    return options


def parse_report(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_kdpo.py report",
        description="Makes one report, report.html and summary.md, of the runs in one or several folders.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="what --metrics_save_dir named")
    parser.add_argument(
        "--metrics_save_dir",
        type=Path,
        metavar="DIR",
        help="a folder of its own for the report (default: report; of one run, that run's own)",
    )
    parser.add_argument("--latex", action="store_true", help="write the tables as summary.tex too")
    parser.add_argument("--easyedit_dir", metavar="DIR", help="a clone of EasyEdit")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    reporting = arguments[:1] == ["report"]
    options = parse_report(arguments[1:]) if reporting else parse_arguments(arguments)
    if options.easyedit_dir:
        os.environ["EASYEDIT_HOME"] = options.easyedit_dir
    try:
        return report(options) if reporting else run(options)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        if type(error).__module__.partition(".")[0] == "kdpo_easyedit" or isinstance(error, ImportError):
            print(f"run_kdpo.py: {error}", file=sys.stderr)
            return 2
        raise


def is_complete(folder: Path, rows: int) -> bool:
    """Whether a folder has all rows of a run."""
    summary = folder / "summary.json"
    return summary.exists() and len(json.loads(summary.read_text(encoding="utf-8"))) == rows


def report(options: argparse.Namespace) -> int:
    from kdpo_easyedit.documents import write_documents

    alone = options.folders[0] if len(options.folders) == 1 else Path("report")
    for file in write_documents(options.folders, options.metrics_save_dir or alone, options.latex):
        print(file)
    return 0


def run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Importing the package finds EasyEdit, which takes a moment; --help should not.
    from kdpo_easyedit import build_world, datasets, world
    from kdpo_easyedit.comparison import SEQUENTIAL, SINGLE, Method, check, compare
    from kdpo_easyedit.documents import write_documents
    from kdpo_easyedit.hparams import load_hparams
    from kdpo_easyedit.report import curve_chart, print_examples, print_tables, radar_chart

    started = time.perf_counter()
    console = Console()
    in_world = options.hparams_dir == world.NAME
    names = options.editing_method or (["KDPO", "FT", "ROME", "MEMIT"] if in_world else ["KDPO"])
    methods = [Method(name, load_hparams(name, options.hparams_dir)) for name in names]
    if not options.data_dir and not in_world:
        raise datasets.DatasetError("data_dir is missing: only the world brings edits of its own; name a benchmark file")
    for method in methods:
        if options.device:
            method.hparams.device = options.device
    protocols = [SEQUENTIAL] if options.sequential_edit else [SINGLE, SEQUENTIAL] if in_world else [SINGLE]
    kept = {"save_edits": options.save_edits, "save_model": options.save_model}
    kept = {key: Path(path) for key, path in kept.items() if path}
    check(methods, protocols, **kept)
    data = options.data_dir or build_world(quiet=options.quiet).edits
    requests = datasets.load_requests(
        data,
        options.datatype,
        size=options.ds_size or (None if options.data_dir else 20),
        shuffle=options.seed if options.shuffle else None,
        need_subject=any("subject" in getattr(method.hparams, "fact_token", "") for method in methods),
    )

    folder = Path(options.metrics_save_dir)
    complete = not options.overwrite and is_complete(folder, len(methods) * len(protocols))
    comparison = compare(
        methods,
        requests,
        protocols,
        folder,
        seed=options.seed,
        eval_at=options.eval_at,
        quiet=options.quiet,
        overwrite=options.overwrite,
        data_name=Path(options.data_dir).name if options.data_dir else "the world's own edits",
        **kept,
    )
    radar_chart(comparison, folder / "radar.png")
    if comparison.curve:
        curve_chart(comparison.curve, folder / "curve.png")
    page, *_ = write_documents([folder], folder, options.latex)
    print_examples(methods[0].name, comparison.examples, console)
    print_tables(comparison, console)
    console.print(f"{time.perf_counter() - started:.0f} s; everything is in {folder}\nthe report: {page}", soft_wrap=True)
    if complete:
        console.print(f"{folder} held this run, complete: these are its figures; --overwrite makes it again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
