"""One edit by hand: what the model says before and after it, in words and in figures."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import edits, host
from .comparison import SINGLE, Method, check_length, continuation, editor_of, plain, target_probability, timed_edit
from .datasets import DatasetError, Request, flat

#: The fields of a record that are prompts, and what they are shown as.
_PROMPTS = {"prompt": "prompt", "rephrase_prompt": "rephrasing", "locality_prompt": "locality"}


@dataclass(frozen=True)
class Said:
    """What a model says.

    Attributes:
        name: the method that edited it, or ``"(before)"``.
        texts: of every prompt's field, what it writes after the prompt, greedily.
        probability: of the new answer as a whole: the product of its tokens' probabilities, each given the prompt and the
            answer up to there (teacher forcing).
        seconds: wall-clock time of the edit; None before it.
        trace: of KDPO, the edit's :class:`kdpo_easyedit.EditTrace` as a mapping; empty for others.
    """

    name: str
    texts: dict[str, str]
    probability: float
    seconds: float | None
    trace: dict[str, Any]


def edit_by_hand(
    methods: Sequence[Method], record: dict[str, str], seed: int = 0, save_edits: Path | None = None
) -> list[Said]:
    """Make one edit with every method, each from the original model, and take it back.

    Args:
        methods: all on the same model, as :func:`kdpo_easyedit.comparison.check` allows them.
        record: ``prompt``, ``target_new`` and, as far as there are any, ``rephrase_prompt``, ``locality_prompt``, ``subject``.
        seed: of all sampling.
        save_edits: a file to keep the edit of the one method in, for :func:`kdpo_easyedit.apply_edits`.

    Returns:
        What the model says before, and after each method's edit.

    Raises:
        DatasetError: an edit that cannot be made, which is known before the model is loaded, or one that it has no room for.
        HostError: a model or device that cannot be had.
    """
    request = check_record(methods, record)
    prompts = {field: record[field] for field in _PROMPTS if record.get(field)}
    save_edits = save_edits and save_edits.resolve()
    methods = [Method(method.name, host.in_place(method.hparams)) for method in methods]
    with tempfile.TemporaryDirectory() as logs, host.output_to(Path(logs)):
        first = host.BaseEditor(copy.copy(methods[0].hparams))
        for field, prompt in prompts.items():
            check_length(f"{field} and target_new", f"{prompt} {request['target_new']}", first.model, first.tok)

        def said(model: Any, name: str, seconds: float | None = None, trace: dict[str, Any] | None = None) -> Said:
            texts = {field: continuation(model, first.tok, prompt, request["target_new"]) for field, prompt in prompts.items()}
            return Said(name, texts, target_probability(model, first.tok, request), seconds, trace or {})

        found = [said(first.model, "(before)")]
        for method in methods:
            editor = editor_of(method, first, SINGLE)
            host.set_memory()
            edit = timed_edit(editor, editor.model, request, seed)
            try:
                found.append(said(edit.model, method.name, edit.seconds, edit.trace))
                if save_edits:
                    edits.save_edits(save_edits, edit.model, edit.originals, [request], plain(editor.hparams))
            finally:
                host.undo_edits(editor, edit.originals)
    return found


def check_record(methods: Sequence[Method], record: dict[str, str]) -> Request:
    """The request that a record by hand makes.

    Raises:
        DatasetError: a text that is empty, or no subject in the prompt where a method needs one.
    """
    for field, text in record.items():
        if not text.strip():
            raise DatasetError(f"{field} is {text!r}; allowed: text that is not empty")
    request = flat(record)
    if record.get("subject") and not request["subject"]:
        raise DatasetError(f"subject is {record['subject']!r}, which is not in the prompt {record['prompt']!r}")
    for method in methods:
        fact_token = getattr(method.hparams, "fact_token", "")
        if "subject" in fact_token and not request["subject"]:
            raise DatasetError(
                f"subject is missing: {method.name} edits at it (fact_token: {fact_token}); give it as it is in the prompt"
            )
    return request


def print_by_hand(record: dict[str, str], found: Sequence[Said], console: Console) -> None:
    """What was said before and after, prompt by prompt, and a table of figures."""
    console.print(Text.assemble("\n", (record["prompt"], "italic"), "  → ", (record["target_new"], "bold"), "\n"))
    words = Table.grid(padding=(0, 2))
    words.add_column(no_wrap=True)
    words.add_column(overflow="fold")
    for field in found[0].texts:
        words.add_row(Text(_PROMPTS[field], style="bold"), Text(record[field], style="italic"))
        for one in found:
            words.add_row(f"  {one.name}", Text(one.texts[field] or "(nothing)", style="dim" if one is found[0] else ""))
        words.add_row()
    console.print(words)

    figures = Table("method", title="the new answer", title_justify="left", title_style="bold")
    for heading in ("probability", "steps", "cycles", "seconds"):
        figures.add_column(heading, justify="right")
    figures.add_column("why it ended")
    for one in found:
        trace = one.trace if "steps" in one.trace else None
        figures.add_row(
            one.name,
            _percent(one.probability),
            str(trace["steps"]) if trace else "–",
            str(sum(map(bool, trace["losses"]))) if trace else "–",  # one that finds the target said does nothing
            "–" if one.seconds is None else f"{one.seconds:.2f}",
            trace["ended"] if trace else "–",
            style="dim" if one is found[0] else "",
        )
    console.print(figures)
    console.print("probability: of the whole answer, the product over its tokens", style="dim", highlight=False)


def _percent(probability: float) -> str:
    """A probability in percent: to two decimals, and below those to two digits."""
    percent = 100 * probability
    return f"{percent:.2f} %" if percent >= 0.01 or percent == 0 else f"{percent:.1e} %"
