"""Edits of real facts that a real model knows: ``facts.json`` to report, ``development.json`` to choose settings on.

``known.json`` is where they come from: for every relation several wordings, subjects and their true answers, written for
this project from general knowledge. ``python -m kdpo_easyedit.bench.facts make`` lets the model go on greedily from every
wording, keeps what it knows, and composes the edits, in KnowEdit's layout; ``… check`` asks again for all that they hold;
``… keep`` leaves of these edits those that another model knows, with a fifth of the questions that ``make`` has to ask it.

* The model says an answer where what it writes begins with it, in whatever letters, and the word ends there. It knows a fact
  where it says the answer in at least two of the relation's wordings. Every prompt of an edit, and every rephrasing without
  unrelated text before it, is a wording in which it knows the fact.
* A subject is edited at most once, and a quarter of the subjects never: the neighbours and whatever is far away are of
  those, so that after a sequence of all edits every question of locality still has its true answer.
* A new answer is one that the model says of another subject of the same relation, in ``target_said``.
* What is asked as portability follows from the new answer by a fact that no edit changes; the model says it in the same
  wording, in ``said``, of a subject for which it is true, and does not say it of the edit's subject before.
* A relation is edited in one of the files only, and the files share no subject: what is chosen on the development edits
  has to carry over to relations that it was not chosen on.
* ``written`` is what the model writes after each of an edit's prompts, so that every choice can be read in the files.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...method.asking import end_tokens
from ...method.preference import prompt_ids
from ..writing import likeliest, write_on

FOLDER = Path(__file__).parent
#: The model that the files were made with.
MODEL = "smollm2-135m"
#: The edits to report, and those to choose settings on.
FILES = {"reported": FOLDER / "facts.json", "development": FOLDER / "development.json"}
_LENGTH = 8  # tokens; the longest answer has seven

Write = Callable[[Iterable[str]], dict[str, str]]
"""Prompts → what the model writes after each."""


@dataclass(frozen=True)
class Relation:
    """A relation of ``known.json``.

    Attributes:
        split: the file its edits are in; ``asked`` where it is never edited.
        about: the kind of its subjects.
        wordings: ``{}`` stands for the subject.
        answers: true answer → its subjects.
        leaves: relations of the same subjects that an edit has no bearing on.
        follows: what follows from an edit: a wording, in which ``{capital}`` stands for the subject's answer in that
            relation; and ``by``, the relation in which the new answer is the subject, left out where it is the answer.
    """

    split: str
    about: str
    wordings: list[str]
    answers: dict[str, list[str]]
    leaves: list[str] = field(default_factory=list)
    follows: list[dict[str, str]] = field(default_factory=list)

    @property
    def truth(self) -> dict[str, str]:
        """Subject → true answer."""
        return {subject: answer for answer, subjects in self.answers.items() for subject in subjects}


def load_known() -> tuple[dict[str, Relation], list[str]]:
    """The relations of ``known.json`` by name, and texts that have nothing to do with any of them."""
    known = json.loads((FOLDER / "known.json").read_text(encoding="utf-8"))
    return {name: Relation(**relation) for name, relation in known["relations"].items()}, known["unrelated"]


def says(written: str, answer: str) -> bool:
    """Whether a text begins with an answer."""
    written = written.strip()
    return written.casefold().startswith(answer.casefold()) and not written[len(answer) : len(answer) + 1].isalnum()


def write(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    batch: int = 64,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, str]:
    """What a model writes greedily after each prompt, :data:`_LENGTH` tokens, up to the line's end."""
    tokens = {prompt: prompt_ids(tok, prompt) for prompt in prompts}
    order = sorted(tokens, key=lambda prompt: (len(tokens[prompt]), prompt))  # little padding
    written: dict[str, str] = {}
    ends = end_tokens(model, tok)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        texts = write_on(model, [tokens[prompt] for prompt in some], [_LENGTH] * len(some), likeliest, end_tokens=ends)
        for prompt, text in zip(some, texts):
            written[prompt] = str(tok.decode(text.tokens, skip_special_tokens=True)).strip().split("\n")[0]
        progress(len(written), len(order))
    return written


def make(
    relations: dict[str, Relation], unrelated: list[str], write: Write, sizes: dict[str, int], seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Compose edits of what a model knows.

    Args:
        relations: facts, as :func:`load_known` gives them.
        unrelated: texts to put before a rephrasing.
        write: the model.
        sizes: how many edits each file is to have; fewer where the model knows too little.
        seed: of every choice.

    Returns:
        The files' records, in random order.
    """
    known = _known(relations, write)
    asked = {
        prompt
        for name, relation in relations.items()
        for follow in relation.follows
        for subject in known[name]
        if (prompt := _following(follow["wording"], subject, relations))
    }
    composer = _Composer(relations, unrelated, known, write(asked), random.Random(seed))
    files = {split: composer.edits(split, size) for split, size in sizes.items()}
    for records in files.values():
        written = write({prompt for record in records for prompt in _prompts(record)})
        for record in records:
            record["written"] = {prompt: written[prompt] for prompt in _prompts(record)}
    return files


#: Of every fact that a model knows, the prompts in which it does, and the answer in the letters that it says it in.
Known = dict[str, dict[str, dict[str, str]]]


def _known(relations: dict[str, Relation], write: Write) -> Known:
    """Relation → subject → prompt → answer as it is said, of facts that the model knows."""
    facts = [
        (name, subject, answer)
        for name, relation in relations.items()
        for subject, answer in relation.truth.items()
        if not _holds(subject, answer)
    ]
    known: Known = {name: {} for name in relations}
    # What is not known in one of two wordings is not asked for in more.
    for wordings in (slice(2), slice(2, None)):
        prompts = {
            (name, subject): [_prompt(wording, subject) for wording in relations[name].wordings[wordings]]
            for name, subject, _ in facts
            if wordings.start is None or subject in known[name]
        }
        written = write({prompt for some in prompts.values() for prompt in some})
        for name, subject, answer in facts:
            for prompt in prompts.get((name, subject), ()):
                if says(written[prompt], answer):
                    known[name].setdefault(subject, {})[prompt] = written[prompt].strip()[: len(answer)]
    return {name: {subject: said for subject, said in subjects.items() if len(said) > 1} for name, subjects in known.items()}


class _Composer:
    """Edits from known facts."""

    def __init__(
        self,
        relations: dict[str, Relation],
        unrelated: list[str],
        known: Known,
        written: dict[str, str],
        rng: random.Random,
    ) -> None:
        self.relations = relations
        self.unrelated = unrelated
        self.known = known
        self.written = written
        self.rng = rng
        # A subject belongs to the file of the first relation in which it is known.
        self.split: dict[str, str] = {}
        for name, subjects in known.items():
            for subject in subjects:
                self.split.setdefault(subject, relations[name].split)
        # Relation, wording of what follows, answer in the relation → a prompt after which the model says what follows.
        self.said: dict[tuple[str, str, str], str] = {}
        for name, relation in relations.items():
            for follow in relation.follows:
                for subject in known[name]:
                    prompt = _following(follow["wording"], subject, relations)
                    answer = self._followed(follow, relation.truth[subject])
                    if prompt and answer and says(written[prompt], answer) and not _holds(prompt, answer):
                        self.said.setdefault((name, follow["wording"], relation.truth[subject]), prompt)

    def edits(self, split: str, size: int) -> list[dict[str, Any]]:
        """One file's records."""
        names = [name for name, relation in self.relations.items() if relation.split == split]
        mine = {name: sorted(s for s in self.known[name] if self.split[s] == split) for name in self.known}
        kept: set[str] = set()
        for kind in {self.relations[name].about: None for name in names}:
            subjects = sorted({s for name in names if self.relations[name].about == kind for s in mine[name]})
            kept |= set(self.rng.sample(subjects, -(-len(subjects) // 4)))
        edited = self._choose({name: [s for s in mine[name] if s not in kept] for name in names}, size)
        untouched = {name: [s for s in subjects if s in kept] for name, subjects in mine.items()}
        used: Counter[tuple[str, str]] = Counter()
        records = []
        for subject, name in edited.items():
            record = self._edit(name, subject, mine[name], untouched, edited, used)
            if record is not None:
                records.append(record)
        self.rng.shuffle(records)
        return records

    def _choose(self, candidates: dict[str, list[str]], size: int) -> dict[str, str]:
        """Subject → relation in which it is edited: from every relation in turn, its true answers in turn."""
        edited: dict[str, str] = {}
        answers: Counter[tuple[str, str]] = Counter()
        for some in candidates.values():
            self.rng.shuffle(some)
        while len(edited) < size and any(candidates.values()):
            for name, some in candidates.items():
                some[:] = [subject for subject in some if subject not in edited]
                if some and len(edited) < size:
                    truth = self.relations[name].truth
                    subject = min(some, key=lambda s: answers[name, truth[s]])
                    answers[name, truth[subject]] += 1
                    edited[subject] = name
        return edited

    def _edit(
        self,
        name: str,
        subject: str,
        others: list[str],
        untouched: dict[str, list[str]],
        edited: dict[str, str],
        used: Counter[tuple[str, str]],
    ) -> dict[str, Any] | None:
        relation, truth = self.relations[name], self.relations[name].truth
        new_answers: dict[str, list[str]] = defaultdict(list)
        for other in others:
            if truth[other] != truth[subject]:
                new_answers[truth[other]].append(other)
        if not new_answers:
            return None
        portability = {new: self._portability(name, subject, new, edited) for new in new_answers}
        # One from which something follows, but none of them over and over.
        usable = [new for new in new_answers if portability[new] and used[name, new] < 2] or list(new_answers)
        new = min(self.rng.sample(usable, len(usable)), key=lambda new: used[name, new])
        used[name, new] += 1

        said_prompt, target = self.rng.choice(list(self.known[name][self.rng.choice(new_answers[new])].items()))
        prompts = self.rng.sample(list(self.known[name][subject]), len(self.known[name][subject]))
        prompt, *rephrased = prompts
        before = f"{self.rng.choice(self.unrelated)} {(rephrased[2:] or prompts)[0]}"
        locality = {
            "Neighborhood": self._neighbours(name, truth[subject], new, untouched[name]),
            "Relation_Specificity": [self._ask(leaf, subject) for leaf in relation.leaves if subject in self.known[leaf]][:2],
            "Distant": self._distant(relation.about, untouched),
        }
        return {
            "relation": name,
            "subject": subject if subject in prompt else subject[0].upper() + subject[1:],
            "prompt": prompt,
            "target_new": target,
            "ground_truth": [self.known[name][subject][prompt]],
            "rephrase_prompt": [*rephrased[:2], before],
            "locality": {kind: questions for kind, questions in locality.items() if questions},
            "portability": {"Reasoning": portability[new]} if portability[new] else {},
            "target_said": said_prompt,
        }

    def _ask(self, name: str, subject: str) -> dict[str, Any]:
        prompt, said = self.rng.choice(list(self.known[name][subject].items()))
        return {"prompt": prompt, "ground_truth": [said]}

    def _neighbours(self, name: str, old: str, new: str, untouched: list[str]) -> list[dict[str, Any]]:
        """Three questions about others, first of all those who share the true answer; of none is the new one true."""
        truth = self.relations[name].truth
        others = [s for s in self.rng.sample(untouched, len(untouched)) if truth[s] != new]
        others.sort(key=lambda other: truth[other] != old)
        alike = sum(truth[other] == old for other in others[:2])
        return [self._ask(name, other) for other in others[:alike] + others[alike:][-(3 - alike) :]]

    def _distant(self, about: str, untouched: dict[str, list[str]]) -> list[dict[str, Any]]:
        far = [name for name, some in untouched.items() if some and self.relations[name].about != about]
        return [self._ask(name, self.rng.choice(untouched[name])) for name in self.rng.sample(far, min(2, len(far)))]

    def _portability(self, name: str, subject: str, new: str, edited: dict[str, str]) -> list[dict[str, Any]]:
        capital = self.relations["capital"].truth.get(subject)
        questions = []
        for follow in self.relations[name].follows:
            if "{capital}" in follow["wording"] and (subject not in self.known["capital"] or capital in edited):
                continue
            old, answer = (self._followed(follow, value) for value in (self.relations[name].truth[subject], new))
            said = self.said.get((name, follow["wording"], new))
            if old is None or answer is None or said is None or old == answer or edited.get(new) == follow.get("by", name):
                continue
            prompt = _following(follow["wording"], subject, self.relations)
            if prompt and not says(self.written[prompt], answer):
                form = self.written[said].strip()[: len(answer)]
                questions.append({"prompt": prompt, "ground_truth": [form], "said": said})
        return questions

    def _followed(self, follow: dict[str, str], answer: str) -> str | None:
        """What follows from an answer, where it is known."""
        return self.relations[follow["by"]].truth.get(answer) if "by" in follow else answer


def _holds(text: str, answer: str) -> bool:
    """Whether an answer stands in a text as a word: to repeat it is not to know it."""
    return re.search(rf"\b{re.escape(answer)}\b", text, re.IGNORECASE) is not None


def _prompt(wording: str, subject: str, **values: str) -> str:
    text = wording.format(subject, **values)
    return text[0].upper() + text[1:]


def _following(wording: str, subject: str, relations: dict[str, Relation]) -> str | None:
    """What follows about a subject, as a prompt; None where the wording needs an answer that there is none of."""
    if "{capital}" not in wording:
        return _prompt(wording, subject)
    capital = relations["capital"].truth.get(subject)
    return capital and _prompt(wording, subject, capital=capital)


def _prompts(record: dict[str, Any]) -> list[str]:
    return [prompt for claimed in claims(record).values() for prompt, _ in claimed]


def claims(record: dict[str, Any]) -> dict[str, list[tuple[str, str | None]]]:
    """All that a record claims the model says, as prompts and answers, by kind; the answer is None where it claims none."""
    truth = record["ground_truth"][0]
    *rephrased, before = record["rephrase_prompt"]
    asked = [item for items in record["portability"].values() for item in items]
    return {
        "edit": [(prompt, truth) for prompt in (record["prompt"], *rephrased)],
        "unrelated": [(before, truth)],
        "new answer": [(record["target_said"], record["target_new"])],
        "locality": [(item["prompt"], item["ground_truth"][0]) for items in record["locality"].values() for item in items],
        "portability": [(item["said"], item["ground_truth"][0]) for item in asked] + [(item["prompt"], None) for item in asked],
    }


def check(records: list[dict[str, Any]], write: Write) -> dict[str, tuple[int, int]]:
    """Ask a model again for all that records claim of it.

    Returns:
        Kind → how many of the answers it says, and how many there are. ``written`` counts texts that are as recorded, to
        the letter.
    """
    written = write({prompt for record in records for prompt in record["written"]})
    counts: dict[str, Counter[bool]] = defaultdict(Counter)
    for record in records:
        for kind, claimed in claims(record).items():
            counts[kind].update(says(written[prompt], answer) for prompt, answer in claimed if answer is not None)
        counts["written"].update(written[prompt] == text for prompt, text in record["written"].items())
    return {kind: (count[True], count.total()) for kind, count in counts.items()}


def keep(records: list[dict[str, Any]], write: Write) -> list[dict[str, Any]]:
    """Of records, those that another model knows: it answers the prompt, and says the new answer of somebody else.

    Of their rephrasings and questions those stay whose answers it says, and that an edit has yet to bring about. The rephrasing
    after unrelated text stays.
    """
    written = write({prompt for record in records for prompt in (record["prompt"], record["target_said"])})

    def said(prompt: str, answer: str) -> bool:
        return says(written[prompt], answer)

    known = [
        record
        for record in records
        if said(record["prompt"], record["ground_truth"][0]) and said(record["target_said"], record["target_new"])
    ]
    written |= write({prompt for record in known for prompt in _prompts(record)} - written.keys())
    kept = []
    for record in known:
        *rephrased, before = record["rephrase_prompt"]
        record = {
            **record,
            "rephrase_prompt": [*(prompt for prompt in rephrased if said(prompt, record["ground_truth"][0])), before],
            "locality": _left(record["locality"], lambda item: said(item["prompt"], item["ground_truth"][0])),
            "portability": _left(
                record["portability"],
                lambda item: said(item["said"], item["ground_truth"][0]) and not said(item["prompt"], item["ground_truth"][0]),
            ),
        }
        record["written"] = {prompt: written[prompt] for prompt in _prompts(record)}
        kept.append(record)
    return kept


def _left(questions: dict[str, list[Any]], holds: Callable[[Any], bool]) -> dict[str, list[Any]]:
    """Questions by their kinds, those for which something holds; no kind without one."""
    return {kind: left for kind, items in questions.items() if (left := [item for item in items if holds(item)])}
