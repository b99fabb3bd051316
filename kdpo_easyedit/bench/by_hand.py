"""One edit by hand: what the model says before and after it, in words and in figures."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..easyedit import host
from ..easyedit import methods as algorithms
from ..easyedit.loading import in_place
from ..easyedit.statistics import prepare, with_text
from ..edits import save_edits as write_edits
from ..edits.file import one_by_one
from ..method.statistics import Text
from .datasets import DatasetError, Request, flat
from .measuring import batching_for, check_length, target_probability
from .protocols import Method, editor_of, plain, timed_edit
from .schema import SINGLE
from .writing import write_answers

#: The fields of a record that are prompts, and what they are shown as.
PROMPTS = {"prompt": "prompt", "rephrase_prompt": "rephrasing", "locality_prompt": "locality"}


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
    methods: Sequence[Method],
    record: dict[str, str],
    seed: int = 0,
    save_edits: Path | None = None,
    stats_text: Text | None = None,
) -> list[Said]:
    """Make one edit with every method, each from the original model, and take it back.

    Args:
        methods: all on the same model, as :func:`kdpo_easyedit.bench.protocols.check` allows them.
        record: ``prompt``, ``target_new`` and, as far as there are any, ``rephrase_prompt``, ``locality_prompt``, ``subject``.
        seed: of all sampling.
        stats_text: what to take second moments over, for the methods that go by them.
        save_edits: a file to keep the edit of the one method in, for :func:`kdpo_easyedit.apply_edits`.

    Returns:
        What the model says before, and after each method's edit.

    Raises:
        DatasetError: an edit that cannot be made, which is known before the model is loaded, or one that it has no room for.
        HostError: a model or device that cannot be had.
    """
    request = check_record(methods, record)
    prompts = {field: request.get(field) or record[field].rstrip() for field in PROMPTS if record.get(field)}
    save_edits = save_edits and save_edits.resolve()
    methods = [Method(method.name, in_place(method.hparams)) for method in methods]
    if stats_text is not None:
        methods = [Method(method.name, with_text(method.hparams, stats_text)) for method in methods]
    with tempfile.TemporaryDirectory() as logs, algorithms.output_to(Path(logs)):
        first = host.BaseEditor(copy.copy(methods[0].hparams))
        prepare(first.model, first.tok, [method.hparams for method in methods], stats_text)
        for field, prompt in prompts.items():
            check_length(f"{field} and target_new", f"{prompt} {request['target_new']}", first.model, first.tok)

        def said(model: Any, name: str, seconds: float | None = None, trace: dict[str, Any] | None = None) -> Said:
            targets = [request["target_new"]] * len(prompts)
            answers = write_answers(model, first.tok, list(prompts.values()), targets, batching=batching_for(model))
            texts = {field: answer.text for field, answer in zip(prompts, answers)}
            return Said(name, texts, target_probability(model, first.tok, request), seconds, trace or {})

        found = [said(first.model, "(before)")]
        for method in methods:
            editor = editor_of(method, first, SINGLE)
            algorithms.set_memory()
            try:
                edit = timed_edit(editor, editor.model, request, seed)
            except ArithmeticError as error:
                raise host.HostError(f"{method.name} could not edit {request['prompt']!r}: {error}") from None
            try:
                found.append(said(edit.model, method.name, edit.seconds, edit.traces[0]))
                if save_edits:
                    changes = edit.factors if one_by_one(edit.model, editor.hparams) else None
                    write_edits(save_edits, edit.model, edit.originals, [request], plain(editor.hparams), changes=changes)
            finally:
                algorithms.undo_edits(editor, edit.originals)
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
