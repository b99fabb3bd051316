"""A gate for edits: what must hold of a model after an edit for the edit to be kept.

``success and locality>=0.98 and perplexity<=1.02``: comparisons of measures with numbers, joined by ``and`` and ``or``, of
which ``and`` binds stronger; a measure alone means that it is 1 or above.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..method.asking import end_tokens
from ..method.packs import greedy
from ..method.preference import has_room, prompt_ids
from ..method.weights import runs_on
from .file import EditsError

#: What a gate can name, and what it is.
MEASURES = {
    "success": "1 where the model says the edit's answer, by teacher forcing; else 0",
    "locality": "the share of the tokens of the unedited model's answers to the regression prompts that the model still says",
    "perplexity": "that of these prompts and answers, over the unedited model's",
}
_COMPARISONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
_TERM = re.compile(r"\s*(\w+)\s*(?:(<=|>=|==|<|>)\s*(\d+(?:\.\d+)?)\s*)?")
# How many tokens of the unedited model's answer to a regression prompt are held against.
_ANSWER = 8


@dataclass(frozen=True)
class Gate:
    """A condition on measures.

    Attributes:
        text: as it was written.
        alternatives: of which one must hold, each by all its comparisons: measure, comparison, number.
    """

    text: str
    alternatives: list[list[tuple[str, str, float]]]

    @classmethod
    def parse(cls, text: str) -> Gate:
        """From its text.

        Raises:
            EditsError: it is no such condition.
        """
        return cls(text, [[_term(term, text) for term in re.split(r"\band\b", part)] for part in re.split(r"\bor\b", text)])

    @property
    def needs_regression(self) -> bool:
        """Whether it names what is measured on regression prompts."""
        return any(measure != "success" for part in self.alternatives for measure, _, _ in part)

    def failing(self, measured: Mapping[str, float]) -> str:
        """What does not hold, of every alternative its first; empty where the gate is passed."""
        reasons = []
        for part in self.alternatives:
            failed = [term for term in part if not _COMPARISONS[term[1]](measured[term[0]], term[2])]
            if not failed:
                return ""
            measure, comparison, number = failed[0]
            reasons.append(f"{measure} is {measured[measure]:.4g}, not {comparison} {number:g}")
        return "; ".join(reasons)


def _term(term: str, text: str) -> tuple[str, str, float]:
    found = _TERM.fullmatch(term)
    if not found or found[1] not in MEASURES:
        raise EditsError(
            f"keep_if is {text!r}, where {term.strip()!r} is no condition; allowed: {', '.join(MEASURES)}, "
            "alone or compared (<=, >=, <, >, ==) with a number, joined by and, or"
        )
    return found[1], found[2] or ">=", float(found[3] or 1)


class Regression:
    """What a model says to prompts that no edit is about, and how well it reads that.

    Attributes:
        texts: of every prompt its tokens and the unedited model's answer: int64 ``[1, L]``, and the number of the prompt's.
    """

    def __init__(self, model: PreTrainedModel, tok: Any, prompts: Sequence[str], context: str = "plain") -> None:
        """From an unedited model, which is given the prompts in one of :data:`.asking.CONTEXTS`.

        Raises:
            EditsError: a prompt without a token, or one that the model has no room for with an answer.
            ContextError: as :func:`.asking.asked`.
        """
        self.texts = []
        device = runs_on(model.get_input_embeddings())
        for prompt in prompts:
            ids = torch.tensor([prompt_ids(tok, prompt, context)], device=device)
            if not ids.shape[1]:
                raise EditsError(f"a regression prompt is {prompt!r}, which has no token")
            if not has_room(model, ids.shape[1] + _ANSWER):
                raise EditsError(
                    f"a regression prompt has {ids.shape[1]} tokens, which leave no room for an answer: {prompt!r:.80}"
                )
            with torch.no_grad():
                answer = greedy(model, ids, _ANSWER).tolist()
            ends = [n for n, token in enumerate(answer, 1) if token in end_tokens(model, tok)]
            answer = answer[: ends[0]] if ends else answer
            self.texts.append((torch.cat((ids, ids.new_tensor([answer])), dim=-1), ids.shape[1]))
        _, self._loss = self._read(model)

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Locality and perplexity of an edited model."""
        locality, loss = self._read(model)
        return {"locality": locality, "perplexity": math.exp(loss - self._loss)}

    def _read(self, model: PreTrainedModel) -> tuple[float, float]:
        """The share of the answers' tokens that are the likeliest, and the mean loss of all tokens, in nats."""
        said = answered = read = 0
        loss = 0.0
        for ids, start in self.texts:
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].float()
            following = ids[0, 1:]
            said += int((logits.argmax(-1) == following)[start - 1 :].sum())
            answered += len(following) - start + 1
            loss += torch.nn.functional.cross_entropy(logits, following, reduction="sum").item()
            read += len(following)
        return said / answered, loss / read
