"""``kdpo edit``: one edit by hand, shown before and after."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .flags import add_context, add_machine, add_methods, load_methods, own_text

DESCRIPTION = """\
Makes one edit, shows what the model says before and after it, and takes it back.
Without --prompt, in a terminal, it asks for edits, one on top of the other, and lets you undo, redo and save them.
"""
PROMPTS = ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "subject")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to edit, how, and where the edit is kept."""
    group = parser.add_argument_group("the edit")
    add_prompts(group)
    add_context(group)
    add_methods(parser.add_argument_group("how"), "KDPO")
    where = parser.add_argument_group("where")
    where.add_argument("--save_edits", metavar="FILE", help="keep the edit of the one method, for kdpo_easyedit.apply_edits")
    add_machine(where)


def add_prompts(group: argparse._ArgumentGroup) -> None:
    """What to edit, and what to look at."""
    group.add_argument("--prompt", metavar="TEXT", help="the prompt to edit (default method: KDPO)")
    group.add_argument("--target_new", metavar="TEXT", help="the new answer to it")
    group.add_argument("--rephrase_prompt", metavar="TEXT", help="the same in other words, to see whether the edit holds there")
    group.add_argument("--locality_prompt", metavar="TEXT", help="a prompt that the edit should not touch")
    group.add_argument("--subject", metavar="TEXT", help="what the prompt is about, as it is there; ROME and MEMIT need it")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Make the edit, and show it."""
    asks = options.prompt is None and sys.stdin.isatty()
    if not asks and (options.prompt is None or options.target_new is None):
        parser.error("one edit by hand needs --prompt and --target_new; without both it asks for them, in a terminal")
    if asks and (named := [flag for flag in PROMPTS if getattr(options, flag) is not None]):
        parser.error(f"--{named[0]} is for one edit by hand, which needs --prompt too; without that it asks for all of them")
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from ..bench.by_hand import Session, check_record, edit_by_hand, in_full
    from ..bench.protocols import check
    from ..bench.schema import SEQUENTIAL, SINGLE
    from ..report.by_hand import print_by_hand

    methods = load_methods(options.editing_method or ["KDPO"], options)
    save_edits = Path(options.save_edits) if options.save_edits else None
    record = {flag: getattr(options, flag) for flag in PROMPTS if getattr(options, flag) is not None}
    (context,) = [options.context] if isinstance(options.context, str) else options.context
    record["context"] = context
    console = Console(markup=False, highlight=False)
    check(methods, [SEQUENTIAL if save_edits else SINGLE], save_edits)
    if asks:
        from .interactive import interact

        if len(methods) > 1:
            parser.error("--editing_method names several methods, and edits on top of one another are made by one")
        with Session(methods[0], options.seed, own_text(methods), options.quiet) as session:
            interact(session, context, save_edits, console)
        return 0
    check_record(methods, record)
    found = edit_by_hand(methods, record, options.seed, save_edits, own_text(methods), options.quiet)
    print_by_hand(in_full(record), found, console)
    if save_edits:
        console.print(f"the edit is in {save_edits}")
    return 0
