"""Edits by hand: what the model says before and after one, in words and in figures; and several, to be undone and redone."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..easyedit import host
from ..easyedit import methods as algorithms
from ..easyedit.loading import in_place
from ..easyedit.statistics import prepare, with_text
from ..edits import save_edits as write_edits
from ..edits.factors import Factors
from ..edits.file import one_by_one
from ..method import kdpo_c
from ..method.asking import asked, context_of
from ..method.config import KDPOHyperParams, plain
from ..method.statistics import Text
from ..method.weights import read, write
from .datasets import DatasetError, Request, flat, written_out
from .inputs import need_subject
from .measuring import batching_for, check_length, target_probability
from .protocols import Edit, Method, editor_of, timed_edit
from .schema import SINGLE
from .writing import write_answers

#: The fields of a record that are prompts, and what they are shown as. The last is the prompt as a plain text, where the edit
#: is made in another context.
PROMPTS = {"prompt": "prompt", "rephrase_prompt": "rephrasing", "locality_prompt": "locality", "plain_prompt": "as plain text"}


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
        plain_probability: of the new answer after the prompt as a plain text, where the edit is made in another context.
    """

    name: str
    texts: dict[str, str]
    probability: float
    seconds: float | None
    trace: dict[str, Any]
    plain_probability: float | None = None


def edit_by_hand(
    methods: Sequence[Method],
    record: dict[str, str],
    seed: int = 0,
    save_edits: Path | None = None,
    stats_text: Text | None = None,
    quiet: bool = False,
) -> list[Said]:
    """Make one edit with every method, each from the original model, and take it back.

    Args:
        methods: all on the same model, as :func:`kdpo_easyedit.bench.protocols.check` allows them.
        record: ``prompt``, ``target_new`` and, as far as there are any, ``rephrase_prompt``, ``locality_prompt``, ``subject``,
            and ``context``, of :data:`kdpo_easyedit.method.asking.CONTEXTS`, in which all prompts are put.
        seed: of all sampling.
        stats_text: what to take second moments over, for the methods that go by them.
        save_edits: a file to keep the edit of the one method in, for :func:`kdpo_easyedit.apply_edits`.
        quiet: show no progress.

    Returns:
        What the model says before, and after each method's edit.

    Raises:
        DatasetError: an edit that cannot be made, which is known before the model is loaded, or one that it has no room for.
        ContextError: the model has no template for the context.
        HostError: a model or device that cannot be had, or an edit that leaves no numbers.
    """
    request, record = check_record(methods, record), in_full(record)
    save_edits = save_edits and save_edits.resolve()
    with prepared(methods, stats_text, quiet) as (methods, first, logs), algorithms.output_to(logs):
        prompts = _prompts(record, request, first)
        found = [_said(first.model, first.tok, request, prompts, "(before)")]
        for method in methods:
            editor = editor_of(method, first, SINGLE)
            algorithms.set_memory()
            edit = _edited(editor, method.name, request, seed)
            try:
                found.append(_said(edit.model, first.tok, request, prompts, method.name, edit))
                if save_edits:
                    changes = edit.factors if one_by_one(edit.model, editor.hparams) else None
                    write_edits(save_edits, edit.model, edit.originals, [request], plain(editor.hparams), changes=changes)
            finally:
                algorithms.undo_edits(editor, edit.originals)
    return found


def check_record(methods: Sequence[Method], record: dict[str, str]) -> Request:
    """The request that a record by hand makes.

    Raises:
        DatasetError: a text that is empty, no subject in the prompt where a method needs one, or a context that it has not.
    """
    for field, text in record.items():
        if not text.strip():
            raise DatasetError(f"{field} is {text!r}; allowed: text that is not empty")
    request = flat(in_full(record))
    if record.get("subject") and not request["subject"]:
        raise DatasetError(f"subject is {record['subject']!r}, which is not in the prompt {record['prompt']!r}")
    for method in methods:
        if need_subject([method.hparams]) and not request["subject"]:
            where = f"fact_token: {method.hparams.fact_token}"
            raise DatasetError(f"subject is missing: {method.name} edits at it ({where}); give it as it is in the prompt")
        if context_of(record) != "plain" and not isinstance(method.hparams, KDPOHyperParams):
            raise DatasetError(f"context is {record['context']!r}; allowed with {method.name}: plain, as EasyEdit puts prompts")
    return {**request, "context": record["context"]} if context_of(record) != "plain" else request


def in_full(record: dict[str, str]) -> dict[str, str]:
    """A record by hand with its subject in the place of every prompt's ``{}``.

    Raises:
        DatasetError: there is none.
    """
    subject = record.get("subject", "").strip()
    return {key: written_out(text, subject, key) if key in PROMPTS else text for key, text in record.items()}


def goes_by_subject(method: Method) -> bool:
    """Whether a method's edit is made at the subject of its prompt, where there is one."""
    return need_subject([method.hparams]) or "subject" in getattr(method.hparams, "positions", "")


class Session:
    """Edits made by hand on one model, each on top of the last, to be undone and redone. A context manager.

    Attributes:
        model, tok: the model, and its tokenizer.
        made: the edits that the model has, oldest first.
        saved: whether these are on disk.
    """

    def __init__(self, method: Method, seed: int = 0, stats_text: Text | None = None, quiet: bool = False) -> None:
        """Load the model.

        Raises:
            HostError: it cannot be had, or the method's edits are not in its weights.
        """
        if not algorithms.edits_weights(method.hparams):
            raise host.HostError(f"{method.name} edits no weights of the model, so that its edits cannot be undone one by one")
        self.seed = seed
        self.made: list[Request] = []
        self.saved = True
        self._states: list[_State] = []  # before each of the edits that were made
        self._undone: list[tuple[Request, Mapping[str, Factors], _State]] = []
        self._factors: list[Mapping[str, Factors]] = []
        self._open = ExitStack()
        ((self.method,), first, self._logs) = self._open.enter_context(prepared([method], stats_text, quiet))
        self.model, self.tok = first.model, first.tok
        with algorithms.output_to(self._logs):
            self._editor = editor_of(self.method, first, SINGLE)
        algorithms.set_memory()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def said(self, prompt: str, context: str = "plain") -> str:
        """What the model writes after a prompt.

        Raises:
            DatasetError, ContextError: as :func:`edit_by_hand`.
        """
        check_length("prompt", asked(self.tok, prompt, context).text, self.model, self.tok)
        return write_answers(self.model, self.tok, [prompt], [""], context, batching=batching_for(self.model))[0].text

    def edit(self, record: dict[str, str]) -> tuple[Said, Said]:
        """Make an edit: what the model said before and says after. What was undone cannot be redone from then on.

        Raises:
            DatasetError, ContextError, HostError: as :func:`edit_by_hand`; the model is as it was.
        """
        request, record = check_record([self.method], record), in_full(record)
        with algorithms.output_to(self._logs):
            prompts = _prompts(record, request, self)
            before, state = _said(self.model, self.tok, request, prompts, "before"), self._state()
            self._editor.hparams.sequential_edit = bool(self.made)
            edit = _edited(self._editor, self.method.name, request, self.seed + len(self.made))
            self._states.append(_State({name: w.cpu() for name, w in edit.originals.items()}, state.protected, state.memory))
            self.made.append(request)
            self._factors.append(edit.factors[0])
            self._undone, self.saved = [], False
            return before, _said(self.model, self.tok, request, prompts, "after", edit)

    def undo(self) -> Request | None:
        """Take the last edit back; None where there is none."""
        if not self.made:
            return None
        before = self._states.pop()
        now = self._state(before.weights)
        self._restore(before)
        request, self.saved = self.made.pop(), not self.made
        self._undone.append((request, self._factors.pop(), now))
        return request

    def redo(self) -> Request | None:
        """Make the edit again that was undone last, to the bit; None where there is none."""
        if not self._undone:
            return None
        request, factors, after = self._undone.pop()
        self._states.append(self._state(after.weights))
        self._restore(after)
        self.made.append(request)
        self._factors.append(factors)
        self.saved = False
        return request

    def save(self, path: Path) -> None:
        """Keep the edits that the model has as a file.

        Raises:
            EditsError: there are none.
        """
        originals: dict[str, torch.Tensor] = {}
        for state in self._states:
            originals = {**state.weights, **originals}
        changes = self._factors if one_by_one(self.model, self._editor.hparams) else None
        write_edits(path, self.model, originals, self.made, plain(self._editor.hparams), changes=changes)
        self.saved = True

    def _state(self, names: Mapping[str, Any] | None = None) -> _State:
        """What there is now; of weights, those of some names."""
        weights = {name: weight.cpu().clone() for name, weight in read(self.model, names or ()).items()}
        contexts, tensors = algorithms.memory()
        memory = contexts, {name: tensor.clone() for name, tensor in tensors.items()}
        return _State(weights, kdpo_c.protected_keys(self.model), memory)

    def _restore(self, state: _State) -> None:
        write(self.model, state.weights)
        algorithms.set_memory(*state.memory)
        if state.protected:
            kdpo_c.protect_keys(self.model, self.tok, self._editor.hparams, state.protected)


@dataclass(frozen=True)
class _State:
    """The weights of a model that an edit has changed, and what methods know of the edits that it holds."""

    weights: dict[str, torch.Tensor]
    protected: dict[str, torch.Tensor]
    memory: tuple[dict[str, Any], dict[str, torch.Tensor]]


@contextmanager
def prepared(
    methods: Sequence[Method], stats_text: Text | None, quiet: bool = False
) -> Iterator[tuple[list[Method], Any, Path]]:
    """The methods as they are anywhere, EasyEdit's editor of the first, with the model, and a folder for what it prints."""
    methods = [Method(method.name, in_place(method.hparams)) for method in methods]
    if stats_text is not None:
        methods = [Method(method.name, with_text(method.hparams, stats_text)) for method in methods]
    with tempfile.TemporaryDirectory() as folder:
        with algorithms.output_to(Path(folder)):
            first = host.BaseEditor(copy.copy(methods[0].hparams))
            prepare(first.model, first.tok, [method.hparams for method in methods], stats_text, quiet)
        yield methods, first, Path(folder)


def _prompts(record: dict[str, str], request: Request, loaded: Any) -> dict[str, tuple[str, str]]:
    """What is asked, field by field: the prompt, and its context.

    Raises:
        DatasetError: one that the model has no room for.
        ContextError: the model has no template for the context.
    """
    context = context_of(request)
    found = {field: (record[field], context) for field in PROMPTS if record.get(field)}
    if context != "plain":
        found["plain_prompt"] = (request["prompt"], "plain")
    for field, (prompt, its) in found.items():
        text = asked(loaded.tok, prompt, its).answered(request["target_new"])
        check_length(f"{field} and target_new", text, loaded.model, loaded.tok)
    return found


def _edited(editor: Any, name: str, request: Request, seed: int) -> Edit:
    """:func:`timed_edit`.

    Raises:
        HostError: the edit leaves no numbers.
    """
    try:
        return timed_edit(editor, editor.model, request, seed)
    except ArithmeticError as error:
        raise host.HostError(f"{name} could not edit {request['prompt']!r}: {error}") from None


def _said(
    model: Any, tok: Any, request: Request, prompts: Mapping[str, tuple[str, str]], name: str, edit: Edit | None = None
) -> Said:
    texts: dict[str, str] = {}
    for context in dict.fromkeys(context for _, context in prompts.values()):
        its = {field: prompt for field, (prompt, of) in prompts.items() if of == context}
        targets = [request["target_new"]] * len(its)
        answers = write_answers(model, tok, list(its.values()), targets, context, batching=batching_for(model))
        texts |= {field: answer.text for field, answer in zip(its, answers)}
    as_plain = target_probability(model, tok, {**request, "context": "plain"}) if "plain_prompt" in prompts else None
    seconds, trace = (edit.seconds, edit.traces[0]) if edit else (None, {})
    return Said(name, texts, target_probability(model, tok, request), seconds, trace, as_plain)
