"""Benchmark files on disk → EasyEdit's requests.

A request is the mapping that EasyEdit's methods and metrics read: ``prompt``, ``target_new``, ``ground_truth``,
``subject``, ``rephrase_prompt`` (where there is one), and ``locality`` and ``portability``, which map a kind to its lists
of prompts and answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Request = dict[str, Any]


class DatasetError(ValueError):
    """A benchmark file that cannot be used; the message names the file, the record, the field and its value."""


def load_requests(path: str | Path, datatype: str | None = None, size: int | None = None) -> list[Request]:
    """Read a benchmark file.

    Args:
        path: a JSON file: a list of records.
        datatype: one of :data:`DATATYPES`; left out, the first record's keys tell.
        size: how many records to take from the start; left out, all.

    Raises:
        DatasetError: no such file, a layout that is not known, or a record that lacks something.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DatasetError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise DatasetError(f"{path}: expected a list of records, at least one")
    if datatype is None:
        datatype = next((name for name, (marks, _) in _LAYOUTS.items() if marks <= records[0].keys()), None)
        if datatype is None:
            raise DatasetError(
                f"{path}: its records' keys ({', '.join(records[0])}) are of no known layout; known: {', '.join(DATATYPES)}"
            )
    elif datatype not in DATATYPES:
        raise DatasetError(f"datatype is {datatype!r}; allowed: {', '.join(DATATYPES)}")
    _, read = _LAYOUTS[datatype]
    requests: list[Request] = []
    for number, record in enumerate(records):
        try:
            request = read(record)
        except DatasetError as error:
            raise DatasetError(f"{path}: record {number}: {error}") from None
        if request is not None:
            requests.append(request)
        if len(requests) == size:
            break
    if size is not None and len(requests) < size:
        raise DatasetError(f"{path}: ds_size is {size}, and the file has {len(requests)} records to edit")
    return requests


def _knowedit(record: Record) -> Request:
    """KnowEdit's ZsRE, WikiData recent and WikiData counterfact."""
    return _request(
        prompt=_text(record, "prompt"),
        target=_text(record, "target_new"),
        subject=_text(record, "subject"),
        ground_truth=_answer(record.get("ground_truth")),
        rephrase=record.get("rephrase_prompt"),
        locality=_kinds(record, "locality"),
        portability=_kinds(record, "portability"),
    )


def _wikibio(record: Record) -> Request:
    """KnowEdit's WikiBio: the prompt is a passage, the target the sentence that should follow."""
    return _request(
        prompt=_text(record, "text"),
        target=_text(record, "labels"),
        subject=_text(record, "concept"),
        locality=_kinds(record, "locality"),
    )


def _mend(record: Record) -> Request | None:
    """ZsRE as MEND and ROME have it, and EasyEdit's file that adds a portability question to it.

    Some of its records have no new answer; EasyEdit passes over them, and so do we.
    """
    if record.get("alt") == "":
        return None
    locality = {"neighborhood": _pairs([(_text(record, "loc"), _answer(record.get("loc_ans")))])}
    portability = {}
    if "portability" in record:
        asked = record["portability"]
        portability["one_hop"] = _pairs([(_text(asked, "New Question"), _answer(asked.get("New Answer")))])
    return _request(
        prompt=_text(record, "src"),
        target=_text(record, "alt"),
        subject=_text(record, "subject"),
        ground_truth=_answer(record.get("answers")),
        rephrase=record.get("rephrase"),
        locality=locality,
        portability=portability,
    )


# A layout's name → the keys that tell it, and its reader.
_KNOWEDIT = ({"prompt", "target_new", "locality"}, _knowedit)
_LAYOUTS: dict[str, tuple[set[str], Callable[[Record], Request | None]]] = {
    "knowedit": _KNOWEDIT,
    "zsre": _KNOWEDIT,  # EasyEdit's names of KnowEdit's files
    "recent": _KNOWEDIT,
    "counterfact": _KNOWEDIT,
    "wikibio": ({"text", "labels", "concept"}, _wikibio),
    "zsre_mend": ({"src", "alt", "loc"}, _mend),
}
DATATYPES = tuple(_LAYOUTS)


def _request(
    prompt: str,
    target: str,
    subject: str,
    ground_truth: str | None = None,
    rephrase: Any = None,
    locality: dict[str, Any] | None = None,
    portability: dict[str, Any] | None = None,
) -> Request:
    if subject not in prompt:
        start = prompt.lower().find(subject.lower())
        if start < 0:
            raise DatasetError(f"subject is {subject!r}, which does not stand in the prompt {prompt!r}")
        subject = prompt[start : start + len(subject)]
    request: Request = {
        "prompt": prompt,
        "target_new": target,
        "subject": subject,
        "ground_truth": ground_truth,
        "locality": _asked(locality or {}),
        "portability": _asked(portability or {}),
    }
    if isinstance(rephrase, str) and rephrase.strip():
        request["rephrase_prompt"] = rephrase
    return request


def _text(record: Record, field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{field} is {value!r}; expected text")
    return value


def _answer(value: Any) -> str | None:
    """The first of an answer's aliases, however deep the file nests them; None where there is none."""
    while isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) and value.strip() else None


def _kinds(record: Record, section: str) -> dict[str, Any]:
    """KnowEdit's ``{kind: [{prompt, ground_truth}, …]}``; questions without an answer are left out."""
    kinds = record.get(section) or {}
    if not isinstance(kinds, dict):
        raise DatasetError(f"{section} is {kinds!r}; expected a mapping of kinds to lists of prompts")
    result = {}
    for kind, items in kinds.items():
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise DatasetError(f"{section}.{kind} is {items!r}; expected a list of {{prompt, ground_truth}}")
        result[kind] = _pairs([(_text(item, "prompt"), _answer(item.get("ground_truth"))) for item in items])
    return result


def _asked(kinds: dict[str, Any]) -> dict[str, Any]:
    return {kind: pairs for kind, pairs in kinds.items() if pairs["prompt"]}


def _pairs(asked: list[tuple[str, str | None]]) -> dict[str, list[str]]:
    """Prompts and answers in EasyEdit's layout."""
    answered = [(prompt, answer) for prompt, answer in asked if answer is not None]
    return {"prompt": [prompt for prompt, _ in answered], "ground_truth": [answer for _, answer in answered]}
