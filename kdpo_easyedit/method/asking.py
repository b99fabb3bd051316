"""How a prompt is put to a model: as it is, as a question to be answered, or through the model's own chat template."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOG = logging.getLogger(__name__)

#: The contexts that a prompt can be put in.
CONTEXTS = ("plain", "qa", "chat")


class ContextError(ValueError):
    """A context that there is not, or that the model's tokenizer has no template for."""


@dataclass(frozen=True)
class Asked:
    """A prompt in its context.

    Attributes:
        text: all that stands before the answer.
        gap: the white space between it and the answer: one space, or what the chat template puts there.
        start: where in the text the prompt begins.
        special_tokens: whether the tokenizer's own special tokens are to be added; a chat template has them in its text.
    """

    text: str
    gap: str
    start: int
    special_tokens: bool

    def answered(self, answer: str) -> str:
        """Text and answer as one, with the gap between them, whatever white space the answer brings."""
        return f"{self.text}{self.gap}{answer.lstrip()}"


def asked(tok: Any, prompt: str, context: str = "plain") -> Asked:
    """Put a prompt in one of :data:`CONTEXTS`.

    In ``chat`` it is the user's turn, and the answer is the assistant's; a model that can think before it answers is to answer
    at once.

    Raises:
        ContextError: there is no such context, the tokenizer has no chat template, or that does not take the prompt as it is.
    """
    match context:
        case "plain":
            return Asked(prompt, " ", 0, True)
        case "qa":
            before = "Question: "
            return Asked(f"{before}{prompt}\nAnswer:", " ", len(before), True)
        case "chat" if getattr(tok, "chat_template", None):
            return _in_chat(tok, prompt)
        case "chat":
            raise ContextError("context is 'chat', and the model's tokenizer has no chat template; allowed with it: plain, qa")
    raise ContextError(f"context is {context!r}; allowed: {', '.join(CONTEXTS)}")


def context_of(request: Mapping[str, Any]) -> str:
    """The context of a request's prompt: ``plain``, where it names none."""
    return str(request.get("context", CONTEXTS[0]))


def end_tokens(model: Any, tok: Any) -> frozenset[int]:
    """The tokens with which a model's text is at its end, as its settings for generation and its tokenizer have them."""
    settings = getattr(model, "generation_config", None)
    of_model, of_tokenizer = getattr(settings, "eos_token_id", None), tok.eos_token_id
    named = of_model if isinstance(of_model, (list, tuple)) else [of_model]
    return frozenset(token for token in (*named, of_tokenizer) if token is not None)


def note_template(tok: Any, request: Mapping[str, Any]) -> None:
    """Where a plain prompt is for a model that has a chat template, let the log say once that it has one."""
    if context_of(request) == "plain" and getattr(tok, "chat_template", None) and not _SAID:
        _SAID.append(tok.chat_template)
        LOG.warning(
            "%r is edited as a plain text, and the model has a chat template; what is asked through that is another prompt: "
            "context: chat in a request, or --context chat, edits it there",
            request["prompt"],
        )


#: The chat templates of which the log has said that they are there.
_SAID: list[Any] = []
# Takes an answer's place, to see what a template puts before it.
_ANSWER = "Answer"


def _in_chat(tok: Any, prompt: str) -> Asked:
    def rendered(*turns: dict[str, str], **settings: Any) -> str:
        try:
            return str(tok.apply_chat_template(list(turns), tokenize=False, enable_thinking=False, **settings))
        except Exception as error:  # a template is a program of the model's authors, and raises what it likes
            raise ContextError(f"the model's chat template does not take the prompt {prompt!r} as it is: {error}") from error

    user = {"role": "user", "content": prompt}
    text = rendered(user, add_generation_prompt=True)
    start = text.rfind(prompt.strip())
    if start < 0:
        raise ContextError(f"the model's chat template makes {text!r} of the prompt {prompt!r}, which is not in there as it is")
    start -= len(prompt) - len(prompt.lstrip())  # the white space that it begins with counts, though a template may cut it
    answer = rendered(user, {"role": "assistant", "content": _ANSWER}).removeprefix(text)
    gap = answer[: len(answer) - len(answer.lstrip())]
    return Asked(text, gap if answer.startswith(gap + _ANSWER) else "", start, False)
