"""``kdpo statistics``: the second moments that KDPO+C, ROME and MEMIT go by, from a text of yours."""

from __future__ import annotations

import argparse
import copy

from .flags import add_machine, add_methods, load_methods

DESCRIPTION = """\
Takes the second moments of what layers are given, over a text, for all layers that the methods edit, in one pass.
They are written where EasyEdit keeps them; a run that is stopped goes on where it was.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The methods, and the text."""
    add_methods(parser.add_argument_group("for what"), "KDPO+C")
    parser.add_argument("--stats_text", metavar="FILE", required=True, help="the text, a passage a line")
    add_machine(parser.add_argument_group("where"))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Make what is missing, and name the files and the keys that lead to them."""
    from rich.console import Console

    from ..bench.datasets import read_text
    from ..easyedit.loading import in_place, load_model, set_apart
    from ..easyedit.statistics import needs_statistics, prepare, with_text

    methods = load_methods(options.editing_method or ["KDPO+C"], options)
    for method in methods:
        if not needs_statistics(method.hparams):
            parser.error(f"{method.name} goes by no second moments; name methods that do, such as KDPO+C, ROME, MEMIT")
    if apart := set_apart(method.hparams for method in methods):
        parser.error(f"{apart}; name methods of one model")
    text = read_text(options.stats_text)
    hparams = [with_text(in_place(copy.copy(method.hparams)), text) for method in methods]
    model, tok = load_model(hparams[0])
    console = Console(markup=False, highlight=False, soft_wrap=True)
    for file in prepare(model, tok, hparams, text, options.quiet):
        console.print(str(file))
    console.print(f"\nin a YAML:\nmom2_dataset: {text.dataset}\nmom2_n_samples: {len(text.passages)}")
    return 0
