"""``kdpo apply``: a list of edits, each kept only where a condition holds after it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .flags import add_context, add_machine, add_methods, load_methods, own_text

DESCRIPTION = """\
Makes the edits of a list one after another, measures the model after each, and takes back those after which a condition does
not hold. What is kept becomes one file of edits; a table says of each edit why. A run that is stopped goes on where it was.
The exit status is 0 where all edits were kept, and 1 where some were not.
"""
KEEP_IF = "success"
# Of the measures with long names.
HEADINGS = {"as_plain": "as\nplain", "rephrased": "re-\nphrased", "perplexity": "per-\nplexity"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The list, the condition, the method."""
    parser.add_argument(
        "list",
        type=Path,
        metavar="LIST.csv",
        help="edits: columns prompt, answer and, as far as there are any, subject and rephrasings",
    )
    parser.add_argument(
        "--regression", type=Path, metavar="PROMPTS.csv", help="prompts that edits should not touch: a column prompt"
    )
    parser.add_argument(
        "--keep_if",
        default=KEEP_IF,
        metavar="CONDITION",
        help='such as "success and locality>=0.98 and perplexity<=1.02", the last two over the regression prompts and against '
        f"the unedited model (default: {KEEP_IF})",
    )
    add_context(parser)
    parser.add_argument("--model", metavar="NAME", help="the model to edit (default: what the YAML says)")
    parser.add_argument(
        "--save_edits", type=Path, metavar="FILE", help="where the kept edits go; the report lies beside it, as FILE.json "
        "(default: LIST.safetensors)",
    )  # fmt: skip
    add_methods(parser.add_argument_group("how"), "KDPO")
    add_machine(parser.add_argument_group("where"))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Make them, and say what became of each."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from ..edits import EditsError, read_header
    from ..edits.file import check_place
    from ..edits.gate import Gate
    from ..edits.gated import MEASURES, GatedList, read_list, read_rows

    gate = Gate.parse(options.keep_if)
    edits = read_list(options.list, options.context)
    prompts = [row["prompt"] for row in read_rows(options.regression, ["prompt"])] if options.regression else []
    if gate.needs_regression and not prompts:
        raise EditsError(f"keep_if is {gate.text!r}, which is measured on prompts; name a file of them with --regression")
    file = options.save_edits or options.list.with_suffix(".safetensors")
    check_place(file)
    model, tok, hparams = _loaded(options)
    work = GatedList(file, model, tok, hparams, gate, edits, prompts, options.context)
    for _ in tqdm(work.go_on(), total=len(edits), initial=len(work.rows), unit="edit", disable=options.quiet):
        pass

    measures = [key for key in MEASURES if key == "success" or any(row[key] is not None for row in work.rows)]
    table = Table("", "edit", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("kept", *(HEADINGS.get(key, key) for key in measures), "in the\nend"):
        table.add_column(heading, no_wrap=True)  # where there is little room, the edit wraps
    for number, row in enumerate(work.rows, 1):
        edit, kept = f"{row['request']['prompt']:.60} → {row['request']['target_new']}", "yes" if row["kept"] else "no"
        shown = ["" if row[key] is None else f"{row[key]:.3g}" for key in measures]
        table.add_row(str(number), edit, kept, *shown, {True: "said", False: "not said", None: ""}[row["in_the_end"]])
    console = Console(markup=False, highlight=False)
    console.print(table)
    for number, row in enumerate(work.rows, 1):
        if not row["kept"]:
            console.print(f"{number} is not kept: {row['why']}", soft_wrap=True)
    number = sum(row["kept"] for row in work.rows)
    where = f", in {file}" if number else ""
    if number and (left := len(read_header(file)["requests"])) < number:
        where += f", which has {left} of them left"
    console.print(f"{number} of {len(edits)} edits are kept{where}", soft_wrap=True)
    console.print(f"the report: {work.report}", soft_wrap=True)
    return 0 if number == len(edits) else 1


def _loaded(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, its tokenizer and the method's hyper-parameters."""
    from ..easyedit.loading import in_place, load_model
    from ..easyedit.statistics import prepare, with_text
    from ..edits import EditsError
    from ..method.config import KDPOHyperParams
    from ..method.kdpo_c import usages

    (method, *more) = load_methods(options.editing_method or ["KDPO"], options)
    if more or not isinstance(method.hparams, KDPOHyperParams):
        raise EditsError(f"editing_method is {' '.join(options.editing_method)}; allowed for a list: KDPO or KDPO+C")
    if options.model:
        method.hparams.model_name = options.model
    text = own_text([method])
    hparams = in_place(method.hparams)
    if text is not None:
        hparams = with_text(hparams, text)
    model, tok = load_model(hparams)
    hparams = hparams.for_model(model)
    if hparams.mom2_adjustment:
        prepare(model, tok, [hparams], text, options.quiet)
        usages(model, tok, hparams)  # whose statistics may be missing
    return model.eval(), tok, hparams
