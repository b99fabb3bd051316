"""A list of edits, made one after another, of which each is kept only where a gate lets it through."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..files import json_text, whole
from ..method.asking import CONTEXTS, context_of
from ..method.config import HParamsError, KDPOHyperParams, plain
from ..method.kdpo import EditTrace, apply_kdpo_to_model, note_unedited
from ..method.kdpo_c import protect_keys, protected_keys
from ..method.preference import filled_in
from ..method.weights import Weights, read, write
from .base import says
from .factors import Factors
from .file import EditsError, apply_edits, as_kept, one_by_one, read_changes, read_header, save_edits
from .gate import Gate, Regression

#: What is measured of an edit; ``as_plain`` is whether a prompt that is put otherwise says it as a plain text too.
MEASURES = ("success", "as_plain", "rephrased", "locality", "perplexity")


def read_list(path: Path, context: str = CONTEXTS[0]) -> list[dict[str, Any]]:
    """The edits of a CSV with the columns ``prompt`` and ``answer``; ``subject``, and any that begin with ``rephras``.

    Args:
        path: of the file.
        context: how the prompts are put to the model, one of :data:`.asking.CONTEXTS`.

    Returns:
        Of every edit a request (``prompt``, with the subject in the place of a ``{}``, ``target_new``, where there is one
        ``subject``, where it is not plain ``context``), and ``rephrasings``.

    Raises:
        EditsError: as :func:`read_rows`; no edit at all, one prompt twice, or a ``{}`` that no subject takes the place of.
    """
    edits: list[dict[str, Any]] = []
    for row in read_rows(path, ["prompt", "answer"]):
        subject = row.get("subject", "").strip()
        try:
            request = {"prompt": filled_in(row["prompt"], subject), "target_new": row["answer"]}
        except ValueError as error:
            raise EditsError(f"{path}: {error}") from None
        if subject:
            request["subject"] = subject
        if context != CONTEXTS[0]:
            request["context"] = context
        rephrasings = [text.strip() for column, text in row.items() if column.startswith("rephras") and text.strip()]
        if any(edit["request"]["prompt"] == request["prompt"] for edit in edits):
            raise EditsError(
                f"{path}: the prompt {request['prompt']!r} is there twice; the second edit would overwrite the first"
            )
        edits.append({"request": request, "rephrasings": rephrasings})
    if not edits:
        raise EditsError(f"{path}: there are no edits in it")
    return edits


def read_rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """A CSV's rows by column, of which the needed ones are filled in.

    Raises:
        EditsError: it is not there, lacks a column, or has an empty field where there must be none.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            columns = [column.strip().lower() for column in next(reader, [])]
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EditsError(f"{path}: cannot be read as CSV in UTF-8: {error}") from None
    if twice := next((column for column in columns if column and columns.count(column) > 1), None):
        raise EditsError(f"{path}: the column {twice!r} is there twice; give each a name of its own, as {twice} 1, {twice} 2")
    for line, cells in lines:
        if any(cells[len(columns) :]):  # empty ones are a spreadsheet's
            raise EditsError(f"{path}: line {line} has more cells than the header; quote those with a comma in them")
    rows = [dict(zip(columns, cells + [""] * (len(columns) - len(cells)))) for _, cells in lines]
    for column in needed:
        if column not in columns:
            raise EditsError(f"{path}: there is no column {column!r}; there are {', '.join(columns) or 'none'}")
        for line, row in enumerate(rows, 2):
            row[column] = row[column].strip()
            if not row[column]:
                raise EditsError(f"{path}: row {line} has an empty {column}")
    return rows


@dataclass
class GatedList:
    """A list under way. After every edit the file and the report hold all that is needed to go on.

    Attributes:
        file: of the edits that are kept.
        model: unedited to begin with; with the edits that are kept in the end.
        tok: its tokenizer.
        hparams: of KDPO, for this model.
        gate: what must hold after an edit.
        edits: as :func:`read_list` gives them.
        prompts: of the regression; none where the gate needs none.
        context: how these are put to the model.
        rows: of every edit that was tried, it, what was measured, whether it is ``kept``, ``why`` not, and, once the list is at
            its end, whether it is said ``in_the_end``.
    """

    file: Path
    model: PreTrainedModel
    tok: Any
    hparams: KDPOHyperParams
    gate: Gate
    edits: Sequence[dict[str, Any]]
    prompts: Sequence[str] = ()
    context: str = CONTEXTS[0]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Find out how far the list has come.

        Raises:
            EditsError: the file, or the report beside it, is of something else.
        """
        given = {"keep_if": self.gate.text, "edits": self.edits, "regression": self.prompts, "hparams": plain(self.hparams)}
        self.settings = json.loads(json.dumps(given | {"context": self.context}))
        if not self.report.exists():
            if self.file.exists():
                raise EditsError(f"{self.file} is there already, and is none of this list's; name another with --save_edits")
            return
        try:
            found = json.loads(self.report.read_text(encoding="utf-8"))
            settings, self.rows = found["settings"], found["rows"]
        except (ValueError, KeyError, TypeError):
            raise EditsError(f"{self.report} is there already, and is no list's; name another file with --save_edits") from None
        if settings != self.settings:
            raise EditsError(f"{self.report} is of another list, condition or method; name another file with --save_edits")
        made = [as_kept(row["request"]) for row in self._kept()]
        if self.is_complete:  # what was taken out of the file since is out
            if made and not self.file.exists():
                raise EditsError(
                    f"{self.file} is gone, and {self.report} says it is done; remove that too to make the edits again"
                )
            return
        again = f"remove {self.report} and {self.file} to make the edits again, or name another with --save_edits"
        saved = read_header(self.file)["requests"] if self.file.exists() else []
        if saved != made:
            if saved != made[:-1]:
                raise EditsError(f"{self.file} does not hold the edits that {self.report} says are kept; {again}")
            # The report is written first: an edit that is in it alone was about to be kept, and is made again.
            self.rows.pop()
        if self._kept() and self.hparams.mom2_adjustment and not self._keys.exists():
            raise EditsError(f"{self._keys} is gone, without which the next edits do not step around these; {again}")

    @property
    def report(self) -> Path:
        """Where the rows are kept."""
        return self.file.with_name(self.file.name + ".json")

    @property
    def is_complete(self) -> bool:
        """Whether the list is at its end."""
        return bool(self.rows) and "in_the_end" in self.rows[-1]

    def go_on(self) -> Iterator[dict[str, Any]]:
        """From where it was stopped to the end: the rows, as they come."""
        if self.is_complete:
            return
        originals = {name: w.clone() for name, w in read(self.model, self.hparams.edited_parameters(self.model)).items()}
        changes: list[dict[str, Factors]] | None = [] if one_by_one(self.model, self.hparams) else None
        regression = Regression(self.model, self.tok, self.prompts, self.context) if self.prompts else None
        if self._kept():
            note_unedited(self.model, self.tok, self.hparams)
            apply_edits(self.model, self.file)
            changes = None if changes is None else read_changes(self.file)
            self._protect()
        for edit in self.edits[len(self.rows) :]:
            self._try(edit, originals, changes, regression)
            yield self.rows[-1]
        for row in self.rows:
            row["in_the_end"] = says(self.model, self.tok, row["request"]) if row["kept"] else None
        self._write_report()
        self._keys.unlink(missing_ok=True)

    def _try(
        self, edit: dict[str, Any], originals: Weights, changes: list[dict[str, Factors]] | None, regression: Regression | None
    ) -> None:
        request, last_keys = edit["request"], self._keys
        row: dict[str, Any] = {**edit, **dict.fromkeys(MEASURES), "why": ""}
        before: Weights = {}
        traces: list[EditTrace] = []
        try:
            _, before = apply_kdpo_to_model(
                self.model, self.tok, [request], self.hparams, return_orig_weights=True, traces=traces
            )
            row["success"] = float(says(self.model, self.tok, request))
            if context_of(request) != CONTEXTS[0]:
                row["as_plain"] = float(says(self.model, self.tok, {**request, "context": CONTEXTS[0]}))
            if edit["rephrasings"]:
                held = [says(self.model, self.tok, {**request, "prompt": prompt}) for prompt in edit["rephrasings"]]
                row["rephrased"] = sum(held) / len(held)
            if regression:
                row |= regression.measure(self.model)
            row["why"] = self.gate.failing(row)
        except BaseException as error:
            if isinstance(error, HParamsError) or not isinstance(error, ValueError):
                self._take_back(before)
                raise
            row["why"] = str(error)  # an edit that failed, or that the model has no room for
        row["kept"] = not row["why"]
        if not row["kept"]:
            self._take_back(before)
        self.rows.append(row)
        self._write_report()
        if row["kept"]:
            if keys := protected_keys(self.model):
                with whole(self._keys) as unfinished:
                    save_file({name: tensor.contiguous() for name, tensor in keys.items()}, unfinished)
            if changes is not None:
                changes.append(traces[0].factors)
            made = [its["request"] for its in self._kept()]
            save_edits(self.file, self.model, originals, made, self.hparams, changes=changes)
            last_keys.unlink(missing_ok=True)

    def _kept(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kept"]]

    @property
    def _keys(self) -> Path:
        """A file of what KDPO+C steps around, of the edits that are kept so far."""
        return self.file.with_name(f"{self.file.name}.{len(self._kept())}.keys")

    def _take_back(self, before: Weights) -> None:
        """Undo the last edit, where there are weights from before it."""
        if before:
            write(self.model, before)
            self._protect()

    def _protect(self) -> None:
        """Go on with what KDPO+C knew of the edits that are kept."""
        if self.hparams.mom2_adjustment and self._keys.exists():
            protect_keys(self.model, self.tok, self.hparams, load_file(self._keys))

    def _write_report(self) -> None:
        with whole(self.report) as unfinished:
            unfinished.write_text(json_text({"settings": self.settings, "rows": self.rows}, indent=1), encoding="utf-8")
