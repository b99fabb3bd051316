"""A judge: another model, asked over HTTP whether written answers say what they should. Optional; a run does without it."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import BadStatusLine, HTTPException, IncompleteRead
from typing import Any

from .metrics import rephrasings
from .runs import Journal
from .schema import EditMetrics, Metrics

#: What the judge is asked of every answer.
PROMPT = """\
A model was asked to go on from a text. Judge whether it says the expected answer.

Text: {prompt}
Expected answer: {target}
Model's answer: {answer}

Other wording, spelling or further details are fine. Another answer, a contradiction, or no answer is not.
Reply with one word, yes or no."""

#: The variable of the environment whose value is sent as the key, where there is one.
KEY = "KDPO_JUDGE_KEY"
_AT_ONCE, _SECONDS, _PAUSES = 8, 60, (1, 4)

Question = tuple[str, str, str]  # prompt, target, answer


class JudgeError(RuntimeError):
    """The judge cannot be asked; the message says why."""


class Judge:
    """A model behind any endpoint that has OpenAI's interface for chats.

    Args:
        url: up to the version, as ``http://localhost:8000/v1``.
        model: its name there.
        journal: where verdicts are kept; what was judged once is not asked again.

    Attributes:
        failure: why it is asked no more; None while all goes well.
    """

    def __init__(self, url: str, model: str, journal: Journal) -> None:
        self.url, self.model, self._journal = url.rstrip("/"), model, journal
        self.failure: str | None = None
        self._verdicts = {
            (entry["prompt"], entry["target"], entry["answer"]): _verdict(entry["reply"])
            for entry in journal.entries
            if entry["model"] == model
        }

    def verdicts(self, questions: Sequence[Question]) -> list[bool | None]:
        """Of every prompt, target and answer, whether the answer says the target; None where the judge does not tell.

        Once it has failed, what it was not asked yet stays None.
        """
        new = list(dict.fromkeys(question for question in questions if question not in self._verdicts))
        for start in range(0, len(new), _AT_ONCE):
            if self.failure:
                break
            some = new[start : start + _AT_ONCE]
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                answered = list(threads.map(self._tried, some))
            for question, reply in zip(some, answered):
                if isinstance(reply, JudgeError):
                    self.failure = self.failure or str(reply)
                    continue
                verdict = _verdict(reply)
                names = ("prompt", "target", "answer")
                self._journal.append({"model": self.model, **dict(zip(names, question)), "verdict": verdict, "reply": reply})
                self._verdicts[question] = verdict
        return [self._verdicts.get(question) for question in questions]

    def _tried(self, question: Question) -> str | JudgeError:
        try:
            return self._asked(question)
        except JudgeError as error:
            return error

    def _asked(self, question: Question) -> str:
        content = PROMPT.format(**dict(zip(("prompt", "target", "answer"), question)))
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        for pause in (*_PAUSES, None):
            try:
                request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                reason, again = f"HTTP {error.code}: {_said(error) or error.reason}", error.code == 429 or error.code >= 500
            except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
                # No connection, none in time, or one that was lost on the way.
                again = isinstance(error, (OSError, BadStatusLine, IncompleteRead))
            if not again or pause is None:
                break
            time.sleep(pause)
        raise JudgeError(f"{self.url}, {self.model}: {reason}")


def judged(judge: Judge, metrics: Sequence[EditMetrics]) -> list[EditMetrics]:
    """Metrics with the judge's verdicts on what was written before and after: ``rewrite_judged`` and ``rephrase_judged``."""
    asked: list[Question] = []
    for entry in metrics:
        asked += [question for phase in (entry.pre, entry.post) for _, question in _questions(entry, phase)]
    judge.verdicts(asked)  # all at once; from here on they are known

    def with_verdicts(entry: EditMetrics, phase: Metrics) -> Metrics:
        found: dict[str, list[Any]] = {}
        for kind, question in _questions(entry, phase):
            (verdict,) = judge.verdicts([question])
            found.setdefault(f"{kind}_judged", []).append(None if verdict is None else float(verdict))
        return {**phase, "generated": {**phase["generated"], **found}} if found else phase

    return [replace(e, pre=with_verdicts(e, e.pre), post=with_verdicts(e, e.post)) for e in metrics]


def _questions(entry: EditMetrics, phase: Metrics) -> list[tuple[str, Question]]:
    request = entry.requested_rewrite
    prompts = {"rewrite": [request["prompt"]], "rephrase": rephrasings(request)}
    return [
        (kind, (prompt, request["target_new"], answer))
        for kind, of in prompts.items()
        for prompt, answer in zip(of, phase.get("generated", {}).get(kind, ()))
    ]


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of what came with an error, as far as it came."""
    try:
        return " ".join(error.read(300).decode(errors="replace").split())
    except (OSError, HTTPException):
        return ""


def _verdict(reply: str) -> bool | None:
    said = reply.rpartition("</think>")[2]  # where thoughts begin, a model's template may have written already
    words = re.findall(r"\b(yes|no)\b", said.casefold())
    return words[0] == "yes" if words and "<think>" not in said else None
