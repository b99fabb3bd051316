"""Benchmark files on disk → EasyEdit's requests.

A request is the mapping that EasyEdit's methods and metrics read: ``prompt``, ``target_new``, ``ground_truth``,
``subject``, ``rephrase_prompt`` (where there is one: text; where there are several: a list of texts, whose mean counts), and
``locality`` and ``portability``, which map a kind to its lists of prompts and answers.

A file is JSON (a list of records), JSON Lines (a record a line; a line ends at ``\\n`` alone) or, by its suffix, CSV (a header,
a record a row); any of them may be compressed with gzip. What a record may look like is in :mod:`.layouts`; each is told by its
own keys, so that a file may mix them. A record may hold several edits: one a language (Bi-ZsRE, MzsRE), one a rewrite (MQuAKE).

Files in use are not all clean. The rules, in every layout:

* Of an answer with aliases, however deep they are nested, the first counts. A number is text, as it is written.
* A question without an answer is left out. A record without a new answer, as zsre_mend has some, is passed over.
* White space at the end of a prompt and around an answer is cut: training and metrics then both put one space between them.
* ``{}`` in a prompt is the place of the subject, as in ROME's files, and is filled in.
* A subject is found in the prompt also in other letters. Where it is not in the prompt, it is empty: methods that look for it
  there (ROME, MEMIT) cannot make such an edit, and where one of them is compared the record is left out, for all alike.
* Of edits with the same prompt the first is kept: they would overwrite each other.
* What is left out or cut is counted in the log, a line a kind. A prompt, or a target that should be there and is not, or
  anything of the wrong type, is an error that names the record.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import random
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from ..method.statistics import Text
from .layouts import LAYOUTS, DatasetError, Edit, Question, Record, edits_of, prompt_and_target, short

LOG = logging.getLogger(__name__)

Request = dict[str, Any]

#: The names of the layouts that are known.
DATATYPES = tuple(LAYOUTS)

_NO_ANSWER = "records without a new answer, left out"


def load_requests(
    path: str | Path,
    datatype: str | None = None,
    size: int | None = None,
    shuffle: int | None = None,
    need_subject: bool = False,
) -> list[Request]:
    """Read a benchmark file.

    Args:
        path: a JSON file, a list of records; JSON Lines, a record a line; or CSV, a record a row. Each also as ``.gz``.
        datatype: one of :data:`DATATYPES`, for all records; left out, each record's keys tell.
        size: how many edits to take from the start; left out, all.
        shuffle: a seed: take the records in random order.
        need_subject: leave out edits whose subject is not in the prompt.

    Raises:
        DatasetError: no such file, a layout that is not known, a record that lacks something, or too few of them.
    """
    path = Path(path)
    if datatype is not None and datatype not in LAYOUTS:
        raise DatasetError(f"datatype is {short(datatype)}; allowed: {', '.join(DATATYPES)}")
    records = _records(path)
    requests: dict[str, Request] = {}
    notes: Counter[str] = Counter()
    order = list(range(len(records)))
    if shuffle is not None:
        random.Random(shuffle).shuffle(order)
    for number in order:
        try:
            edits = edits_of(records[number], datatype)
            notes[_NO_ANSWER] += not edits
            taken = [_add(requests, edit, need_subject, notes) if len(requests) != size else None for edit in edits]
            for edit, request in zip(edits, taken):
                # What follows from all of a record's edits does not follow from some.
                if edit.together and request and not all(taken):
                    notes["questions that need edits which are left out, left out"] += bool(request["portability"])
                    request["portability"] = {}
        except DatasetError as error:
            raise DatasetError(f"{path}: record {number}: {error}") from None
        if len(requests) == size:
            break
    for note, count in notes.items():
        if count:
            LOG.warning("%s: %s: %d (in %d records)", path, note, count, len(records))
    if len(requests) < (size or 1):
        wanted = "at least one is needed" if size is None else f"ds_size is {size}"
        raise DatasetError(f"{path}: {wanted}, and the file has {len(requests)} records to edit")
    return list(requests.values())


def flat(record: Record) -> Request:
    """The request of one record that is flat: ``prompt``, ``target_new``, and whatever else there is, side by side.

    Raises:
        DatasetError: it lacks something.
    """
    (edit,) = prompt_and_target(record)
    return _request(edit, Counter())


def read_passages(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty; a line ends at ``\\n`` alone.

    Raises:
        DatasetError: it cannot be read, or has none.
    """
    passages = [line.strip() for line in _read(Path(path)).split("\n") if line.strip()]
    if not passages:
        raise DatasetError(f"{path}: it holds no text")
    return passages


def read_text(path: str | Path) -> Text:
    """A text file for second moments, which go by its name; raises as :func:`read_passages`."""
    return Text(Path(path).stem, read_passages(path))


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not in UTF-8: {error.reason} at byte {error.start}") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise DatasetError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _records(path: Path) -> list[Record]:
    text = _read(path)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    records = _table(path, text) if suffix in (".csv", ".tsv") else _json(path, text)
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise DatasetError(f"{path}: expected a list of records, at least one")
    return records


def _json(path: Path, text: str) -> Any:
    # Numbers stay as they are written; NaN, which pandas writes where nothing is, is nothing.
    decoder = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=lambda _: None)
    try:
        records = decoder.decode(text)
        return [records] if isinstance(records, dict) else records  # one line of JSON Lines
    except (ValueError, RecursionError) as error:
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                records += [decoder.decode(line)] if line.strip() else []
            except (ValueError, RecursionError):
                where = f"line {number} is no record" if records else str(error)
                raise DatasetError(f"{path}: not a JSON file: {where}") from None
        return records


def _table(path: Path, text: str) -> list[Record]:
    header = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    names = [name for name in rows.fieldnames or () if name]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DatasetError(f"{path}: the column {twice!r} is there twice; give each a name of its own")
    try:
        records = [{key: value or None for key, value in row.items()} for row in rows]
    except csv.Error as error:
        raise DatasetError(f"{path}: not a CSV file: line {rows.reader.line_num}: {error}") from None
    for number, record in enumerate(records):
        if None in record:
            raise DatasetError(f"{path}: record {number} has more cells than the header; quote those with a delimiter in them")
    return records


def _add(requests: dict[str, Request], edit: Edit, need_subject: bool, notes: Counter[str]) -> Request | None:
    """Take an edit among the requests, or count why not."""
    if edit.target is None:
        notes[_NO_ANSWER] += 1
        return None
    cut: Counter[str] = Counter()
    request = _request(edit, cut)
    if request["prompt"] in requests:
        notes["edits with a prompt that was there before, left out"] += 1
    elif need_subject and not request["subject"]:
        notes["edits without their subject in the prompt, left out"] += 1
    else:
        requests[request["prompt"]] = request
        notes.update(cut)
        return request
    return None


def _request(edit: Edit, notes: Counter[str]) -> Request:
    """An edit by the rules above."""
    given = edit.subject.strip()

    def prompt(text: str, name: str) -> str:
        notes["prompts with white space at the end, cut"] += text != text.rstrip()
        return written_out(text, given, name)

    def answer(text: str) -> str:
        notes["answers with white space around them, cut"] += text != text.strip()
        return _sound(text.strip(), "an answer")

    def section(kinds: dict[str, list[Question]], name: str) -> dict[str, dict[str, list[str]]]:
        asked: dict[str, dict[str, list[str]]] = {}
        for kind, questions in kinds.items():
            for text, truth in questions:
                if truth is None:
                    notes["questions without an answer, left out"] += 1
                    continue
                pairs = asked.setdefault(kind, {"prompt": [], "ground_truth": []})
                pairs["prompt"].append(prompt(text, f"{name}.{kind}"))
                pairs["ground_truth"].append(answer(truth))
        return asked

    request: Request = {"prompt": prompt(edit.prompt, "prompt"), "target_new": answer(edit.target or "")}
    request["subject"] = _subject(given, request["prompt"])
    notes["subjects that are not in their prompt, taken as empty"] += bool(given) and not request["subject"]
    request["ground_truth"] = edit.ground_truth and answer(edit.ground_truth)
    request["locality"] = section(edit.locality, "locality")
    request["portability"] = section(edit.portability, "portability")
    rephrasings = list(dict.fromkeys(prompt(text, "rephrase_prompt") for text in edit.rephrasings))
    if rephrasings:
        request["rephrase_prompt"] = rephrasings[0] if len(rephrasings) == 1 else rephrasings
    return request


def written_out(text: str, subject: str, name: str) -> str:
    """A prompt with the subject in the place of its ``{}``, without white space at its end.

    Raises:
        DatasetError: there is no subject, or more than one place for it, or half a character; the message begins with ``name``.
    """
    places = text.count("{}")
    if places and (places > 1 or not subject):
        lack = "no subject is given" if places == 1 else f"there are {places} of them"
        raise DatasetError(f"{name} is {short(text)}; {{}} is the place of the subject, and {lack}: write the prompt out")
    return _sound(text.replace("{}", subject).rstrip(), name)


def _sound(text: str, name: str) -> str:
    """A text that can be written and tokenised: JSON's escapes can also spell halves of characters.

    Raises:
        DatasetError: it holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"{name} is {short(ascii(text))}; character {error.start} is half a surrogate pair") from None
    return text


def _subject(subject: str, prompt: str) -> str:
    """The subject as it stands in the prompt; empty where it does not. In other letters it has to be a word by itself."""
    if subject in prompt:
        return subject
    found = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt, re.IGNORECASE)
    return found.group() if found else ""
