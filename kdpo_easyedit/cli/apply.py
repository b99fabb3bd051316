"""``kdpo apply``: a list of edits, each kept only where a condition holds after it."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import add_machine, add_methods, load_methods

if TYPE_CHECKING:
    from ..edits.gate import Gate

DESCRIPTION = """\
Makes the edits of a list one after another, measures the model after each, and takes back those after which a condition does
not hold. What is kept becomes one file of edits; a table says of each edit why. A run that is stopped goes on where it was.
The exit status is 0 where all edits were kept, and 1 where some were not.
"""
KEEP_IF = "success"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The list, the condition, the method."""
    parser.add_argument(
        "list", type=Path, metavar="LIST.csv", help="edits: columns prompt, answer and, as far as there are any, rephrasings"
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
    parser.add_argument("--model", metavar="NAME", help="the model to edit (default: what the YAML says)")
    parser.add_argument(
        "--save_edits", type=Path, metavar="FILE", help="where the kept edits go; the report lies beside it, as FILE.json "
        "(default: LIST.safetensors)",
    )  # fmt: skip
    add_methods(parser.add_argument_group("how"), "KDPO")
    add_machine(parser.add_argument_group("where"))


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Make them, and say what became of each."""
    from rich.console import Console
    from rich.table import Table
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from ..edits import EditsError
    from ..edits.gate import Gate

    gate = Gate.parse(options.keep_if)
    edits = _read_list(options.list)
    prompts = [row["prompt"] for row in _rows(options.regression, ["prompt"])] if options.regression else []
    if gate.needs_regression and not prompts:
        raise EditsError(f"keep_if is {gate.text!r}, which is measured on prompts; name a file of them with --regression")
    model, tok, hparams = _loaded(options)
    file = options.save_edits or options.list.with_suffix(".safetensors")
    work = _Work(file, model, tok, hparams, gate, prompts, edits)
    rows = work.go_on()

    table = Table("", "edit", "kept", "success", "rephrased", "locality", "perplexity", "in the end")
    for number, row in enumerate(rows, 1):
        edit, kept = f"{row['prompt']:.60} → {row['answer']}", "yes" if row["kept"] else "no"
        shown = ["" if row[key] is None else f"{row[key]:.3g}" for key in ("success", "rephrased", "locality", "perplexity")]
        table.add_row(str(number), edit, kept, *shown, {True: "said", False: "not said", None: ""}[row["in_the_end"]])
    console = Console(markup=False, highlight=False)
    console.print(table)
    for number, row in enumerate(rows, 1):
        if not row["kept"]:
            console.print(f"{number} is not kept: {row['why']}", soft_wrap=True)
    number = sum(row["kept"] for row in rows)
    console.print(f"{number} of {len(rows)} edits are kept" + (f", in {work.file}" if number else ""), soft_wrap=True)
    console.print(f"the report: {work.report}", soft_wrap=True)
    return 0 if number == len(rows) else 1


class _Work:
    """A list under way. After every edit the file and the report hold all that is needed to go on."""

    def __init__(
        self, file: Path, model: Any, tok: Any, hparams: Any, gate: Gate, prompts: list[str], edits: list[dict[str, Any]]
    ) -> None:
        import torch

        from ..edits.gate import Regression

        self.file, self.report = file, file.with_name(file.name + ".json")
        self.model, self.tok, self.hparams, self.gate, self.edits = model, tok, hparams, gate, edits
        self.regression = Regression(model, tok, prompts) if prompts else None
        settings = {"keep_if": gate.text, "edits": edits, "regression": prompts, "hparams": vars(hparams)}
        self.settings = json.loads(json.dumps(settings, default=str))
        self.rows: list[dict[str, Any]] = []
        # KDPO+C's changes add up, and are kept one by one; those of a model in half precision are lost in its rounding.
        one_by_one = hparams.mom2_adjustment and model.dtype == torch.float32
        self.changes: list[dict[str, Any]] | None = [] if one_by_one else None

    @property
    def keys(self) -> Path:
        """A file of what KDPO+C steps around, of the edits that are kept so far."""
        return self.file.with_name(f"{self.file.name}.{sum(row['kept'] for row in self.rows)}.keys")

    def go_on(self) -> list[dict[str, Any]]:
        """From where it was stopped to the end. A row an edit."""
        from ..edits import apply_edits
        from ..edits.base import says
        from ..edits.file import read_changes
        from ..method.weights import read

        originals = {name: w.clone() for name, w in read(self.model, self.hparams.edited_parameters(self.model)).items()}
        self._resume()
        if self._is_complete():
            return self.rows
        if any(row["kept"] for row in self.rows):
            apply_edits(self.model, self.file)
            self.changes = None if self.changes is None else read_changes(self.file)
            self._protect()
        for edit in self.edits[len(self.rows) :]:
            self._try(edit, originals)
        for row in self.rows:
            row["in_the_end"] = says(self.model, self.tok, _request(row)) if row["kept"] else None
        self._write_report()
        self.keys.unlink(missing_ok=True)
        return self.rows

    def _resume(self) -> None:
        from ..edits import EditsError, read_header

        if not self.report.exists():
            if self.file.exists():
                raise EditsError(f"{self.file} is there already, and is none of this list's; name another with --save_edits")
            return
        found = json.loads(self.report.read_text(encoding="utf-8"))
        if found["settings"] != self.settings:
            raise EditsError(f"{self.report} is of another list, condition or method; name another file with --save_edits")
        self.rows = found["rows"]
        # The report is written first: an edit that is in it alone was about to be kept, and is made again.
        saved = len(read_header(self.file)["requests"]) if self.file.exists() else 0
        if sum(row["kept"] for row in self.rows) > saved and not self._is_complete():
            self.rows.pop()

    def _is_complete(self) -> bool:
        return bool(self.rows) and "in_the_end" in self.rows[-1]

    def _protect(self) -> None:
        """Go on with what KDPO+C knew of the edits that are kept."""
        from safetensors.torch import load_file

        from ..method.kdpo_c import protect_keys

        if self.hparams.mom2_adjustment and self.keys.exists():
            protect_keys(self.model, self.tok, self.hparams, load_file(self.keys))

    def _try(self, edit: dict[str, Any], originals: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        from ..edits import save_edits
        from ..edits.base import says
        from ..files import whole
        from ..method.config import HParamsError
        from ..method.kdpo import apply_kdpo_to_model
        from ..method.kdpo_c import protected_keys
        from ..method.weights import write

        request = _request(edit)
        row: dict[str, Any] = {**edit, **dict.fromkeys(("success", "rephrased", "locality", "perplexity")), "why": ""}
        before: Any = {}
        try:
            _, before = apply_kdpo_to_model(self.model, self.tok, [request], self.hparams, return_orig_weights=True)
            row["success"] = float(says(self.model, self.tok, request))
            if edit["rephrasings"]:
                held = [says(self.model, self.tok, {**request, "prompt": prompt}) for prompt in edit["rephrasings"]]
                row["rephrased"] = sum(held) / len(held)
            if self.regression:
                row |= self.regression.measure(self.model)
            row["why"] = self.gate.failing(row)
        except HParamsError:
            raise
        except ValueError as error:  # an edit that failed, or that the model has no room for
            row["why"] = str(error)
        row["kept"] = not row["why"]
        if not row["kept"] and before:
            write(self.model, before)
            self._protect()
        last_keys = self.keys
        self.rows.append(row)
        self._write_report()
        if row["kept"]:
            if keys := protected_keys(self.model):
                with whole(self.keys) as unfinished:
                    save_file({name: tensor.contiguous() for name, tensor in keys.items()}, unfinished)
            if self.changes is not None:
                self.changes.append(self._change(before, edit))
            made = [_request(its) for its in self.rows if its["kept"]]
            save_edits(self.file, self.model, originals, made, self.hparams, changes=self.changes)
            last_keys.unlink(missing_ok=True)

    def _change(self, before: dict[str, Any], edit: dict[str, Any]) -> dict[str, Any]:
        """What KDPO+C has added: of a rank of the edit's tokens at most."""
        from ..edits.factors import best, spectrum
        from ..method.preference import edit_tokens
        from ..method.weights import read

        rank = edit_tokens(self.tok, edit["prompt"], edit["answer"]).input_ids.shape[1]
        found = {}
        for name, weight in read(self.model, before).items():
            change = weight.cpu().double() - before[name].cpu().double()
            found[name] = best(change, spectrum(change)[1][:, :rank])
        return found

    def _write_report(self) -> None:
        from ..files import json_text, whole

        with whole(self.report) as unfinished:
            unfinished.write_text(json_text({"settings": self.settings, "rows": self.rows}, indent=1), encoding="utf-8")


def _request(row: dict[str, Any]) -> dict[str, str]:
    return {"prompt": row["prompt"], "target_new": row["answer"]}


def _loaded(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, its tokenizer and the method's hyper-parameters."""
    from ..easyedit.loading import in_place, load_model
    from ..edits import EditsError
    from ..method.config import KDPOHyperParams
    from ..method.kdpo_c import usages

    (method, *more) = load_methods(options.editing_method or ["KDPO"], options)
    if more or not isinstance(method.hparams, KDPOHyperParams):
        raise EditsError(
            f"editing_method is {' '.join(options.editing_method)}; allowed for a list: KDPO, KDPO+C or DPO, one of them"
        )
    if options.model:
        method.hparams.model_name = options.model
    hparams = in_place(method.hparams)
    model, tok = load_model(hparams)
    hparams = hparams.for_model(model)
    if hparams.mom2_adjustment:
        usages(model, tok, hparams)  # whose statistics may be missing
    return model.eval(), tok, hparams


def _read_list(path: Path) -> list[dict[str, Any]]:
    """Of every edit ``prompt``, ``answer`` and ``rephrasings``.

    Raises:
        EditsError: as :func:`_rows`; no edit at all, or one prompt twice.
    """
    from ..edits import EditsError

    edits: list[dict[str, Any]] = []
    for row in _rows(path, ["prompt", "answer"]):
        rephrasings = [text.strip() for column, text in row.items() if column.startswith("rephras") and text.strip()]
        if any(edit["prompt"] == row["prompt"] for edit in edits):
            raise EditsError(f"{path}: the prompt {row['prompt']!r} is there twice; the second edit would overwrite the first")
        edits.append({"prompt": row["prompt"], "answer": row["answer"], "rephrasings": rephrasings})
    if not edits:
        raise EditsError(f"{path}: there are no edits in it")
    return edits


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """A CSV's rows by column.

    Raises:
        EditsError: it is not there, lacks a column, or has an empty field where there must be none.
    """
    from ..edits import EditsError

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            columns = [column.strip().lower() for column in reader.fieldnames or []]
            rows = [dict(zip(columns, [text or "" for text in row.values()])) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EditsError(f"{path}: cannot be read as CSV in UTF-8: {error}") from None
    for column in needed:
        if column not in columns:
            raise EditsError(f"{path}: there is no column {column!r}; there are {', '.join(columns) or 'none'}")
        for line, row in enumerate(rows, 2):
            row[column] = row[column].strip()
            if not row[column]:
                raise EditsError(f"{path}: row {line} has an empty {column}")
    return rows
