"""``kdpo edits``: what a file of edits holds, and one edit taken out of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .export import as_loaded

DESCRIPTION = """\
list FILE        the edits of a file
show FILE N      one of them, and how it was made
remove FILE N    takes one out, where the file keeps them one by one, and says whether the model still says the others
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do with which file."""
    parser.add_argument("action", choices=("list", "show", "remove"))
    parser.add_argument("file", type=Path, metavar="FILE", help="a file of edits")
    parser.add_argument("number", nargs="?", type=int, metavar="N", help="of an edit, as list counts them, from 1")
    parser.add_argument("--model", metavar="NAME", help="the unedited model (default: the folder that the edits were made on)")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Do it."""
    if (options.action == "list") != (options.number is None):
        parser.error("list takes a file alone; show and remove also the number of an edit")
    from ..edits import EditsError, read_header

    header = read_header(options.file)
    requests = header["requests"]
    if options.action == "list":
        kept = "one by one" if header.get("format") == 2 else "as one change"
        print(f"{len(requests)} edits of {header['base_model']}, kept {kept}")
        for number, request in enumerate(requests, 1):
            print(f"{number:4}  {_shown(request)}")
        return 0
    if not 1 <= options.number <= len(requests):
        raise EditsError(f"{options.file}: there is no edit {options.number}; there are {len(requests)}")
    if options.action == "show":
        _show(header, options.number)
    else:
        _remove(options.file, options.number, options.model)
    return 0


def _show(header: Mapping[str, Any], number: int) -> None:
    print(_shown(header["requests"][number - 1]))
    print(f"model: {header['base_model']}")
    print(f"weights: {', '.join(header['weights'])}")
    for what in ("hparams", "versions"):
        print(f"{what}: " + ", ".join(f"{key}={value!r}" for key, value in (header[what] or {}).items()))
    if header["license"]:
        print(f"license: {header['license']}")


def _remove(file: Path, number: int, name: str | None) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from ..edits import edits_applied, read_header, remove_edit
    from ..edits.base import load_base, says

    request = read_header(file)["requests"][number - 1]
    model, tok = load_base(file, as_loaded(name))
    remove_edit(file, number, model)
    print(f"edit {number} is taken out: {_shown(request)}")
    with edits_applied(model, file):
        for left in read_header(file)["requests"]:
            print(f"  {'is said' if says(model, tok, left) else 'IS NOT SAID'}: {_shown(left)}")


def _shown(request: Mapping[str, Any]) -> str:
    where = f"in {request['context']}: " if "context" in request else ""
    return f"{where}{request['prompt']!r} → {request['target_new']!r}"
