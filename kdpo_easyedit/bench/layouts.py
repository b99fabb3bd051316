"""The layouts of benchmark files: what a record asks for, as it stands there.

A layout is told by the keys of its records, each record by itself, so that a file may mix them. :data:`LAYOUTS` is the table;
a reader maps a record to its edits and leaves all that layouts have in common (white space, places for the subject, questions
without an answer, the same prompt twice) to :mod:`.datasets`.

All numbers are text by then: they are read as they are written. Anything else where text is expected is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

Record = dict[str, Any]
#: A prompt, and its answer; None where the file has none.
Question = tuple[str, str | None]


class DatasetError(ValueError):
    """A benchmark file that cannot be used; the message names the file, the record, the field and its value."""


@dataclass
class Edit:
    """One edit of a record.

    Attributes:
        prompt: what is asked; ``{}`` in it, as in all prompts here, is a place for the subject.
        target: the new answer; None where the record has none and may be passed over.
        subject: what the prompt is about; empty where the file does not say.
        ground_truth: the answer before.
        rephrasings: the prompt in other words.
        locality: a kind → questions whose answers should stay.
        portability: a kind → questions whose answers should follow.
        together: whether they follow from all of the record's edits together, and from none alone.
    """

    prompt: str
    target: str | None
    subject: str = ""
    ground_truth: str | None = None
    rephrasings: list[str] = field(default_factory=list)
    locality: dict[str, list[Question]] = field(default_factory=dict)
    portability: dict[str, list[Question]] = field(default_factory=dict)
    together: bool = False


def edits_of(record: Record, datatype: str | None = None) -> list[Edit]:
    """What a record asks for; several edits where it holds several.

    Raises:
        DatasetError: no layout has such keys, or the record lacks what its layout needs.
    """
    if datatype is None:
        known = (name for name, (marks, _) in LAYOUTS.items() if all(_has(record, mark) for mark in marks))
        datatype = next(known, None)
    if datatype is None:
        keys = ", ".join(short(key, quoted=False) for key in list(record)[:20])
        raise DatasetError(f"its keys ({keys}) are of no known layout; known: {', '.join(LAYOUTS)}")
    return list(LAYOUTS[datatype][1](record))


def short(value: Any, quoted: bool = True) -> str:
    """A value for a message: what Python writes for it, cut to 60 characters."""
    text = repr(value) if quoted else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def prompt_and_target(record: Record) -> Iterator[Edit]:
    """KnowEdit, CKnowEdit, EasyEdit's own form, and records that are flat: all have a prompt and a new answer side by side."""
    truth = "ground_truth" if "ground_truth" in record else "target_old"
    yield Edit(
        prompt=_text(record, "prompt"),
        target=_target(record, "target_new"),
        subject=_answer(record.get("subject"), "subject") or "",
        ground_truth=_answer(record.get(truth), truth),
        rephrasings=_rephrasings(record, "rephrase_prompt", "rephrase"),
        locality=_section(record, "locality", "neighborhood"),
        portability=_section(record, "portability", "one_hop"),
    )


def _wikibio(record: Record) -> Iterator[Edit]:
    """KnowEdit's WikiBio: the prompt is a passage, the target the sentence that should follow."""
    yield Edit(
        prompt=_text(record, "text"),
        target=_target(record, "labels"),
        subject=_text(record, "concept"),
        locality=_section(record, "locality", "neighborhood"),
    )


def _zsre(record: Record, prompt: str = "src", target: str = "alt") -> Iterator[Edit]:
    """ZsRE as MEND and ROME have it, EasyEdit's file that adds a question to it, and WikiBigEdit, which adds two more.

    Some of ZsRE's records have no new answer; EasyEdit passes over them, and so do we.
    """
    new = None if record.get(target) in (None, "") else _target(record, target)
    portability = {"personas": _asked(record, "personas", target), "multi_hop": _asked(record, "mhop", "mhop_ans")}
    portability["one_hop"] = _one_hop(record)
    truth = "answers" if "answers" in record else "ground_truth"
    yield Edit(
        prompt=_text(record, prompt),
        target=new,
        subject=_answer(record.get("subject"), "subject") or "",
        ground_truth=_answer(record.get(truth), truth),
        rephrasings=_rephrasings(record, "rephrase"),
        locality={"neighborhood": _asked(record, "loc", "loc_ans")},
        portability=portability,
    )


def _languages(record: Record) -> Iterator[Edit]:
    """Bi-ZsRE, MzsRE and their like, ``{"en": {…}, "zh": {…}}``: an edit a language, in the order of the record."""
    inner = {
        key: value for key, value in record.items() if re.fullmatch(r"[a-z]{2,3}([-_]\w+)?", key) and isinstance(value, dict)
    }
    if not inner:
        raise DatasetError("it has no mapping under a language's code; expected {'en': {…}, …}")
    for language, asked in inner.items():
        try:
            yield from edits_of(asked)
        except DatasetError as error:
            raise DatasetError(f"{language}: {error}") from None


def _rome(record: Record) -> Iterator[Edit]:
    """CounterFact as ROME's authors published it."""
    rewrite = _mapping(record, "requested_rewrite")
    true = _answer(rewrite.get("target_true"), "target_true")
    yield Edit(
        prompt=_text(rewrite, "prompt"),
        target=_target(rewrite, "target_new"),
        subject=_text(rewrite, "subject"),
        ground_truth=true,
        rephrasings=_rephrasings(record, "paraphrase_prompts"),
        locality={"neighborhood": [(prompt, true) for prompt in _texts(record, "neighborhood_prompts")]},
        portability={"one_hop": _one_hop(record)},
    )


def _one_hop(record: Record) -> list[Question]:
    """EasyEdit's question of what follows, in its files of ZsRE and CounterFact."""
    return _asked(_mapping(record, "portability"), "New Question", "New Answer") if record.get("portability") else []


def _mquake(record: Record) -> Iterator[Edit]:
    """MQuAKE: an edit a rewrite. Its questions need all the record's rewrites, so they hold after edits in sequence alone."""
    answer = _answer(record.get("new_answer"), "new_answer")
    for rewrite in _mappings(record, "requested_rewrite"):
        yield Edit(
            prompt=_text(rewrite, "prompt"),
            target=_target(rewrite, "target_new"),
            subject=_text(rewrite, "subject"),
            ground_truth=_answer(rewrite.get("target_true"), "target_true"),
            rephrasings=_rephrasings(rewrite, "question"),
            portability={"multi_hop": [(question, answer) for question in _texts(record, "questions")]},
            together=True,
        )


def _akew(record: Record) -> Iterator[Edit]:
    """AKEW: the target is a passage that holds the new fact; the triplets that were found in it are what should follow."""
    for rewrite in _mappings(record, "requested_rewrite"):
        asked = "question" if rewrite.get("question") else "prompt"
        triplets = _mappings(rewrite, "unsfact_triplets_GPT")
        yield Edit(
            prompt=_text(rewrite, asked),
            target=_target(rewrite, "fact_new_uns"),
            subject=_text(rewrite, "subject"),
            ground_truth=_answer(rewrite.get("target_true"), "target_true"),
            rephrasings=(_rephrasings(rewrite, "prompt") if asked != "prompt" else [])
            + _rephrasings(record, "paraphrase_prompts"),
            portability={
                "sub_questions": [
                    (
                        _text(triplet, "prompt").replace("{}", _text(triplet, "subject")),
                        _answer(triplet.get("target"), "target"),
                    )
                    for triplet in triplets
                ]
            },
        )


def _unke(record: Record) -> Iterator[Edit]:
    """UnKE: the target is a passage; the questions that it answers are what should follow."""
    yield Edit(
        prompt=_text(record, "question"),
        target=_target(record, "answer"),
        rephrasings=_rephrasings(record, "para_question"),
        portability={"sub_questions": _asked(record, "sub_question", "sub_answer")},
    )


def _hallu(record: Record) -> Iterator[Edit]:
    """HalluEditBench. Its yes-or-no and multiple-choice questions are not among what is measured here; its question of
    locality has no answer in the file.
    """
    said = next((key for key in record if key.startswith("output_")), "output")
    hops = {f"{hops}hop": _asked(record, f"question_{hops}hop", f"answer_{hops}hop") for hops in range(2, 7)}
    yield Edit(
        prompt=_text(record, "question"),
        target=_target(record, "object"),
        subject=_text(record, "subject"),
        ground_truth=_answer(record.get(said), said),
        rephrasings=_rephrasings(record, "paraphrased_question"),
        locality={"neighborhood": _asked(record, "locality_question", "locality_answer")},
        portability=hops | {"reversed_relation": _asked(record, "reversed_relation_question", "subject")},
    )


#: What stands around the subject in RippleEdits' sentences (its src/relation.py), where that is not "RELATION of {} is".
_RIPPLE = {
    "SIBLING": "siblings of {} are",
    "NUMBER_OF_CHILDREN": "number of children {} has is",
    "SEX_OR_GENDER": "gender of {} is",
    "COUNTRY": "country which {} is associated with is",
    "POSITION_HELD": "position held by {} is",
    "MEMBER_OF_SPORTS_TEAM": "sports team which {} is a member of is",
    "LEAGUE": "league which {} plays in is",
    "NATIVE_LANGUAGE": "mother tongue of {} is",
    "AWARD_RECEIVED": "award {} won is",
    "FOLLOWS": "{} follows",
    "FOLLOWED_BY": "{} is followed by",
    "ETHNIC_GROUP": "ethnic group which {} is associated with is",
    "RELIGION": "religion which {} is associated with is",
    "CONTINENT": "continent which {} is part of is",
    "CAPITAL": "capital city of {} is",
    "CURRENCY": "currency in {} is",
    "LIKELY_ANTHEM": "most likely to be performed in {} is",
    "CAPITAL_OF": "country which {} is the capital of is",
    "CAST_MEMBER": "cast members of {} are",
}


def _ripple(record: Record) -> Iterator[Edit]:
    """RippleEdits gives edits as sentences, "The name of the spouse of A is B.", before and after.

    What both sentences share ends the prompt, at the relation's verb: two answers may begin with the same word.
    """
    edit = _mapping(record, "edit")
    sentence, relation = _text(edit, "prompt").strip(), _answer(edit.get("relation"), "relation") or ""
    before = next(
        (edit[key].get("prompt") for key in ("original_fact", "previous_fact") if isinstance(edit.get(key), dict)), None
    )
    same = takewhile(lambda pair: pair[0] == pair[1], zip(sentence, before if isinstance(before, str) else sentence))
    shared = "".join(letter for letter, _ in same)
    opening, ending = _RIPPLE.get(relation, f"{relation.lower().replace('_', ' ')} of {{}} is").split("{}")
    verbs = (shared.rfind(f"{verb} ") + len(verb) for verb in (ending, " is") if f"{verb} " in shared)
    end = next(verbs, shared.rfind(" ") if before else -1)
    prompt, target = sentence[: max(end, 0)], sentence[max(end, 0) :].strip().removesuffix(".")
    if not prompt or not target:
        raise DatasetError(f"edit.prompt is {short(sentence)}; expected a sentence that ends in its answer, '… is ANSWER.'")
    named = prompt.removesuffix(ending) if prompt.endswith(ending) else ""
    kinds = {key: _ripple_tests(record, key) for key in record if isinstance(record[key], list)}
    keep = {key for key in kinds if key.startswith(("Relation_Spec", "Forget"))}
    yield Edit(
        prompt=prompt,
        target=target,
        subject=named.partition(opening)[2] if opening else named,
        ground_truth=before[len(prompt) :].strip().removesuffix(".") if isinstance(before, str) else None,
        locality={key: kinds[key] for key in kinds if key in keep},
        portability={key: kinds[key] for key in kinds if key not in keep},
    )


def _ripple_tests(record: Record, group: str) -> list[Question]:
    return [
        (_text(query, "prompt"), _answer(query.get("answers"), f"{group}.answers"))
        for test in _mappings(record, group)
        for query in _mappings(test, "test_queries")
    ]


_PLAIN = (("prompt", "target_new"), prompt_and_target)

#: A layout's name → the keys that tell it (a dot goes into a mapping, or a list's first), and its reader. The first that fits
#: is taken. Names that share a reader are those that EasyEdit and the files go by.
LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[Record], Iterator[Edit]]]] = {
    "knowedit": _PLAIN,
    "zsre": _PLAIN,
    "recent": _PLAIN,
    "counterfact": _PLAIN,
    "cknowedit": _PLAIN,
    "flat": _PLAIN,
    "wikibio": (("text", "labels", "concept"), _wikibio),
    "zsre_mend": (("src", "alt"), _zsre),
    "wikibigedit": (("update", "ans"), partial(_zsre, prompt="update", target="ans")),
    "bizsre": (("en",), _languages),
    "mzsre": (("en",), _languages),
    "akew": (("requested_rewrite.fact_new_uns",), _akew),
    "mquake": (("requested_rewrite", "questions", "new_answer"), _mquake),
    "counterfact_rome": (("requested_rewrite",), _rome),
    "rippleedits": (("edit.prompt",), _ripple),
    "unke": (("question", "para_question", "answer"), _unke),
    "halluedit": (("subject", "question", "object"), _hallu),
}


def _has(record: Any, mark: str) -> bool:
    for key in mark.split("."):
        record = record[0] if isinstance(record, list) and record else record
        if not isinstance(record, dict) or key not in record:
            return False
        record = record[key]
    return True


def _mapping(record: Record, key: str) -> Record:
    value = record.get(key)
    if not isinstance(value, dict):
        raise DatasetError(f"{key} is {short(value)}; expected a mapping")
    return value


def _mappings(record: Record, key: str) -> list[Record]:
    """A list of mappings; one that stands alone counts as a list of one."""
    value = record.get(key) or []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) for item in values):
        raise DatasetError(f"{key} is {short(value)}; expected a list of mappings")
    return values


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{key} is {short(value)}; expected text")
    return value


def _texts(record: Record, key: str) -> list[str]:
    value = record.get(key) or []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DatasetError(f"{key} is {short(value)}; expected a list of texts")
    return value


def _target(record: Record, key: str) -> str:
    """A new answer: text, ``{"str": text}``, or a list of one of these."""
    value = record.get(key)
    while (isinstance(value, list) and len(value) == 1) or (isinstance(value, dict) and "str" in value):
        value = value[0] if isinstance(value, list) else value["str"]
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{key} is {short(value)}; expected text (one new answer)")
    return value


def _answer(value: Any, key: str) -> str | None:
    """The first of an answer's aliases, however deep the file nests them; None where there is none."""
    if isinstance(value, dict) and value.keys() & {"str", "value"}:
        value = value.get("str", value.get("value"))
    if isinstance(value, list):
        return next(filter(None, (_answer(alias, key) for alias in value)), None)
    if value is not None and not isinstance(value, str):
        raise DatasetError(f"{key} is {short(value)}; expected text")
    return value if value and value.strip() else None


def _rephrasings(record: Record, *keys: str) -> list[str]:
    """All the texts under the keys, each of which may hold one text or a list of them."""
    texts = []
    for key in keys:
        value = record.get(key)
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not isinstance(text, str):
                raise DatasetError(f"{key} is {short(value)}; expected text, or a list of texts")
            texts += [text] if text and text.strip() else []
    return texts


def _asked(record: Record, prompt: str, answer: str) -> list[Question]:
    """A question under two keys, or a list of them; none where there is no prompt."""
    return _questions(record[prompt], record.get(answer), prompt) if record.get(prompt) else []


def _questions(prompts: Any, answers: Any, where: str) -> list[Question]:
    listed = prompts if isinstance(prompts, list) else [prompts]
    if not all(isinstance(prompt, str) and prompt.strip() for prompt in listed):
        raise DatasetError(f"{where}: a prompt is {short(prompts)}; expected text, or a list of texts")
    if len(listed) == 1:  # then a list of answers is one of aliases
        answers = [answers]
    elif answers is None:
        answers = [None] * len(listed)
    if not isinstance(answers, list) or len(answers) != len(listed):
        raise DatasetError(f"{where}: {len(listed)} prompts, and the answers are {short(answers)}; expected as many")
    return [(prompt, _answer(answer, where)) for prompt, answer in zip(listed, answers)]


def _section(record: Record, section: str, kind: str) -> dict[str, list[Question]]:
    """Locality or portability, in all the forms that stand beside a prompt and its target.

    ``{kind: [{prompt, ground_truth}, …]}`` (KnowEdit), ``{kind: {prompt: […], ground_truth: […]}}`` (what EasyEdit's editor
    takes), ``[{prompt, answer}, …]`` (CKnowEdit), and ``locality_prompt`` beside ``locality_ground_truth`` (flat).
    """
    found: dict[str, list[Question]] = {}
    for key in (section, f"{section}_inputs"):
        value = record.get(key) or {}
        if isinstance(value, list) or (isinstance(value, dict) and "prompt" in value):
            value = {kind: value}
        if not isinstance(value, dict):
            raise DatasetError(f"{key} is {short(value)}; expected a mapping of kinds to lists of questions")
        for name in value:
            try:
                items = _mappings(value, name)
            except DatasetError:
                raise DatasetError(
                    f"{key}.{name} is {short(value[name])}; expected a list of {{prompt, ground_truth}}"
                ) from None
            for item in items:
                answer = item["ground_truth"] if "ground_truth" in item else item.get("answer")
                found.setdefault(name, []).extend(_questions(item.get("prompt"), answer, f"{key}.{name}"))
    answer = f"{section}_ground_truth" if f"{section}_ground_truth" in record else f"{section}_answer"
    found.setdefault(kind, []).extend(_asked(record, f"{section}_prompt", answer))
    return found
