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
  python run_kdpo.py --ablation --metrics_save_dir ablation
  python run_kdpo.py --prompt "Ruhon Nugil works as a" --target_new banker --locality_prompt "Ruhon Nugil was born in"
  python run_kdpo.py --hparams_dir qwen1.5-0.5b --data_dir ZsRE-test-all.json --ds_size 100 --device cuda:0
  python run_kdpo.py report output hundred --metrics_save_dir both    (see report --help)
"""
_BY_HAND = ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "subject")
_NOT_BY_HAND = (
    "sequential_edit", "eval_at", "ablation", "data_dir", "datatype", "ds_size", "shuffle", "stats_text", "metrics_save_dir",
    "overwrite", "save_model",
)  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--editing_method",
        nargs="+",
        metavar="METHOD",
        help="methods to compare, each with its YAML in hparams/METHOD/ "
        "(default: KDPO KDPO+C FT ROME MEMIT for the world, else KDPO)",
    )
    what.add_argument(
        "--hparams_dir",
        default="world",
        metavar="NAME",
        help="a model's short name, such as qwen1.5-0.5b, looked up as hparams/METHOD/NAME.yaml; "
        "or, for one method, the path of a YAML (default: world, a small model that is trained here; large-world is one with "
        "room for 500 edits)",
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
    what.add_argument(
        "--ablation",
        action="store_true",
        help="KDPO against DPO, the paper's ablation, as one table: negatives by teacher forcing or as the model writes them, "
        "generated every cycle or once an edit (default: sequential edits, measured after 100 and 500)",
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
    data.add_argument(
        "--stats_text",
        metavar="FILE",
        help="a text, a passage a line, to compute the covariance statistics from that a method needs and that are not there",
    )
    hand = parser.add_argument_group("one edit by hand", "shows what the model says before and after, and writes no folder")
    hand.add_argument("--prompt", metavar="TEXT", help="the prompt to edit (default method: KDPO)")
    hand.add_argument("--target_new", metavar="TEXT", help="the new answer to it")
    hand.add_argument("--rephrase_prompt", metavar="TEXT", help="the same in other words, to see whether the edit holds there")
    hand.add_argument("--locality_prompt", metavar="TEXT", help="a prompt that the edit should not touch")
    hand.add_argument("--subject", metavar="TEXT", help="what the prompt is about, as it is there; ROME and MEMIT need it")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--metrics_save_dir",
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
    if options.ablation:
        for flag in ("editing_method", "save_edits", "save_model"):
            if getattr(options, flag):
                parser.error(f"--ablation compares four methods of its own, and takes no --{flag}")
    if options.prompt is None or options.target_new is None:
        for flag in _BY_HAND:
            if getattr(options, flag) is not None:
                parser.error(f"--{flag} is for one edit by hand, which needs --prompt and --target_new")
    else:
        for flag in _NOT_BY_HAND:
            if getattr(options, flag) != parser.get_default(flag):
                parser.error(f"--prompt makes one edit by hand, and takes no --{flag}")
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
        return report(options) if reporting else run_by_hand(options) if options.prompt is not None else run(options)
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


def run_by_hand(options: argparse.Namespace) -> int:
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from kdpo_easyedit import build_world, world
    from kdpo_easyedit.by_hand import check_record, edit_by_hand, print_by_hand
    from kdpo_easyedit.comparison import SEQUENTIAL, SINGLE, Method, check
    from kdpo_easyedit.hparams import load_hparams

    methods = [Method(name, load_hparams(name, options.hparams_dir)) for name in options.editing_method or ["KDPO"]]
    for method in methods:
        if options.device:
            method.hparams.device = options.device
    save_edits = Path(options.save_edits) if options.save_edits else None
    record = {flag: getattr(options, flag) for flag in _BY_HAND if getattr(options, flag) is not None}
    check(methods, [SEQUENTIAL if save_edits else SINGLE], save_edits)
    check_record(methods, record)
    if options.hparams_dir in world.RECIPES:
        build_world(world.RECIPES[options.hparams_dir], options.quiet)
    found = edit_by_hand(methods, record, options.seed, save_edits)
    console = Console()
    print_by_hand(record, found, console)
    if save_edits:
        console.print(f"the edit is in {save_edits}", highlight=False)
    return 0


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
    from kdpo_easyedit.comparison import SEQUENTIAL, SINGLE, Method, ablation, check, compare
    from kdpo_easyedit.documents import write_documents
    from kdpo_easyedit.hparams import load_hparams
    from kdpo_easyedit.report import curve_chart, print_ablation, print_examples, print_tables, radar_chart

    started = time.perf_counter()
    console = Console()
    in_world = options.hparams_dir in world.RECIPES
    of_world = ["KDPO", "KDPO+C", "FT", "ROME", "MEMIT"]
    names = options.editing_method or (of_world if in_world and not options.ablation else ["KDPO"])
    methods = [Method(name, load_hparams(name, options.hparams_dir)) for name in names]
    if options.ablation:
        methods = ablation(methods[0].hparams)
    if not options.data_dir and not in_world:
        raise datasets.DatasetError("data_dir is missing: only the world brings edits of its own; name a benchmark file")
    for method in methods:
        if options.device:
            method.hparams.device = options.device
    protocols = [SEQUENTIAL] if options.sequential_edit or options.ablation else [SINGLE, SEQUENTIAL] if in_world else [SINGLE]
    kept = {"save_edits": options.save_edits, "save_model": options.save_model}
    kept = {key: Path(path) for key, path in kept.items() if path}
    check(methods, protocols, **kept)
    stats_texts = datasets.read_passages(Path(options.stats_text)) if options.stats_text else []
    data = options.data_dir or build_world(world.RECIPES[options.hparams_dir], options.quiet).edits
    requests = datasets.load_requests(
        data,
        options.datatype,
        size=options.ds_size or (None if options.data_dir or options.ablation else 20),
        shuffle=options.seed if options.shuffle else None,
        need_subject=any("subject" in getattr(method.hparams, "fact_token", "") for method in methods),
    )
    eval_at = options.eval_at
    if options.ablation:
        requests = requests[: options.ds_size or (500 if len(requests) >= 500 else 100)]
        eval_at = eval_at or [100, 500]

    folder = Path(options.metrics_save_dir or "output")
    complete = not options.overwrite and is_complete(folder, len(methods) * len(protocols))
    comparison = compare(
        methods,
        requests,
        protocols,
        folder,
        seed=options.seed,
        eval_at=eval_at,
        quiet=options.quiet,
        overwrite=options.overwrite,
        stats_texts=stats_texts,
        data_name=Path(options.data_dir).name if options.data_dir else "the world's own edits",
        **kept,
    )
    radar_chart(comparison, folder / "radar.png")
    if comparison.curve:
        curve_chart(comparison.curve, folder / "curve.png")
    page, *_ = write_documents([folder], folder, options.latex)
    if options.ablation:
        print_ablation(comparison, console)
    else:
        print_examples(methods[0].name, comparison.examples, console)
        print_tables(comparison, console)
    console.print(f"{time.perf_counter() - started:.0f} s; everything is in {folder}\nthe report: {page}", soft_wrap=True)
    if complete:
        console.print(f"{folder} held this run, complete: these are its figures; --overwrite makes it again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
