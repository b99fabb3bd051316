"""Benchmark files on disk → EasyEdit's requests.

A request is the mapping that EasyEdit's methods and metrics read: ``prompt``, ``target_new``, ``ground_truth``,
``subject``, ``rephrase_prompt`` (where there is one), and ``locality`` and ``portability``, which map a kind to its lists
of prompts and answers.

Files in use are not all clean. The rules, in every layout:

* Of an answer with aliases, however deep they are nested, the first counts.
* A question without an answer is left out. A record without a new answer, as zsre_mend has some, is passed over.
* A subject is found in the prompt also in other letters. Where it is not in the prompt, it is empty: methods that look for it
  there (ROME, MEMIT) cannot make such an edit, and where one of them is compared the record is left out, for all alike.
* Of records with the same prompt the first is kept: edits of one prompt overwrite each other.
* What is left out is counted in the log. A prompt, or a target that should be there and is not, or anything of the wrong
  type, is an error that names the record.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)

Record = dict[str, Any]
Request = dict[str, Any]


class DatasetError(ValueError):
    """A benchmark file that cannot be used; the message names the file, the record, the field and its value."""


def load_requests(
    path: str | Path,
    datatype: str | None = None,
    size: int | None = None,
    shuffle: int | None = None,
    need_subject: bool = False,
) -> list[Request]:
    """Read a benchmark file.

    Args:
        path: a JSON file, a list of records; or JSON Lines, a record a line.
        datatype: one of :data:`DATATYPES`; left out, the first record's keys tell.
        size: how many records to take from the start; left out, all.
        shuffle: a seed: take them in random order.
        need_subject: leave out records whose subject is not in the prompt.

    Raises:
        DatasetError: no such file, a layout that is not known, a record that lacks something, or too few of them.
    """
    path = Path(path)
    records = _records(path)
    if datatype is None:
        datatype = next((name for name, (marks, _) in _LAYOUTS.items() if marks <= records[0].keys()), None)
        if datatype is None:
            raise DatasetError(
                f"{path}: its records' keys ({', '.join(records[0])}) are of no known layout; known: {', '.join(DATATYPES)}"
            )
    elif datatype not in DATATYPES:
        raise DatasetError(f"datatype is {datatype!r}; allowed: {', '.join(DATATYPES)}")
    _, read = _LAYOUTS[datatype]
    requests: dict[str, Request] = {}
    left_out = dict.fromkeys(
        ("without a new answer", "with a prompt that was there before", "without their subject in the prompt"), 0
    )
    order = list(range(len(records)))
    if shuffle is not None:
        random.Random(shuffle).shuffle(order)
    for number in order:
        try:
            request = read(records[number])
        except DatasetError as error:
            raise DatasetError(f"{path}: record {number}: {error}") from None
        if request is None:
            left_out["without a new answer"] += 1
        elif request["prompt"] in requests:
            left_out["with a prompt that was there before"] += 1
        elif need_subject and not request["subject"]:
            left_out["without their subject in the prompt"] += 1
        else:
            requests[request["prompt"]] = request
        if len(requests) == size:
            break
    for reason, count in left_out.items():
        if count:
            LOG.warning("%s: %d of %d records %s are left out", path, count, len(records), reason)
    if len(requests) < (size or 1):
        wanted = "at least one is needed" if size is None else f"ds_size is {size}"
        raise DatasetError(f"{path}: {wanted}, and the file has {len(requests)} records to edit")
    return list(requests.values())


def read_passages(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DatasetError: it cannot be read, or has none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as text: {error}") from None
    passages = [line.strip() for line in lines if line.strip()]
    if not passages:
        raise DatasetError(f"{path}: it holds no text")
    return passages


def _records(path: Path) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not in UTF-8: {error}") from None
    try:
        records = json.loads(text)
        if isinstance(records, dict):  # one line of JSON Lines
            records = [records]
    except ValueError as error:
        records = []
        for number, line in enumerate(text.splitlines()):
            try:
                records += [json.loads(line)] if line.strip() else []
            except ValueError:
                where = f"line {number + 1} is no record" if records else str(error)
                raise DatasetError(f"{path}: not a JSON file: {where}") from None
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise DatasetError(f"{path}: expected a list of records, at least one")
    return records


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
    if record.get("portability"):
        asked = _mapping(record, "portability")
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


def _rome(record: Record) -> Request:
    """CounterFact as ROME's authors published it."""
    rewrite = _mapping(record, "requested_rewrite")
    subject, true = _text(rewrite, "subject"), _text(_mapping(rewrite, "target_true"), "str")
    neighbours = _texts(record, "neighborhood_prompts")
    return _request(
        prompt=_text(rewrite, "prompt").replace("{}", subject),
        target=_text(_mapping(rewrite, "target_new"), "str"),
        subject=subject,
        ground_truth=true,
        rephrase=next(iter(_texts(record, "paraphrase_prompts")), None),
        locality={"neighborhood": _pairs([(prompt, true) for prompt in neighbours])},
    )


def flat(record: Record) -> Request:
    """A prompt and a new answer, and whatever else there is, side by side: EasyEdit's CounterFact, WikiBigEdit, your own."""

    def asked(section: str) -> dict[str, list[str]]:
        prompt = record.get(f"{section}_prompt")
        return _pairs([(_text(record, f"{section}_prompt"), _answer(record.get(f"{section}_ground_truth")))] if prompt else [])

    return _request(
        prompt=_text(record, "prompt"),
        target=_text(record, "target_new"),
        subject=record.get("subject") or "",
        ground_truth=_answer(record.get("ground_truth")),
        rephrase=record.get("rephrase_prompt"),
        locality={"neighborhood": asked("locality")},
        portability={"one_hop": asked("portability")},
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
    "counterfact_rome": ({"requested_rewrite"}, _rome),
    "flat": ({"prompt", "target_new"}, flat),
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
    if not isinstance(subject, str):
        raise DatasetError(f"subject is {subject!r}; expected text")
    if subject not in prompt:
        start = prompt.casefold().find(subject.casefold())
        found = prompt[start : start + len(subject)] if start >= 0 else ""
        subject = found if found.casefold() == subject.casefold() else ""
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


def _mapping(record: Record, field: str) -> Record:
    value = record.get(field)
    if not isinstance(value, dict):
        raise DatasetError(f"{field} is {value!r}; expected a mapping")
    return value


def _texts(record: Record, field: str) -> list[str]:
    value = record.get(field) or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DatasetError(f"{field} is {value!r}; expected a list of texts")
    return value


def _text(record: Record, field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{field} is {value!r}; expected text")
    return value


def _answer(value: Any) -> str | None:
    """The first of an answer's aliases, however deep the file nests them; None where there is none."""
    while isinstance(value, list):
        value = next((alias for alias in value if alias), None)
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
