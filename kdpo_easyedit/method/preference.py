"""What KDPO prefers to what: tokens, negatives and the loss, as pure functions of tensors.

T is the number of target tokens, V the size of the vocabulary. Everything follows section 3 of the paper
(arXiv 2406.09920); nothing here knows of EasyEdit.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .asking import CONTEXTS, asked, context_of

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditTokens:
    """The one sequence of an edit.

    Attributes:
        input_ids: prompt and target, special tokens included; int64, shape ``[1, L]``.
        prompt_length: P, the number of the prompt's tokens: position P holds the first target token.
    """

    input_ids: Tensor
    prompt_length: int

    @property
    def targets(self) -> Tensor:
        """The target's tokens y_1 … y_T: int64, shape ``[T]``."""
        return self.input_ids[0, self.prompt_length :]


def normalised(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request with its prompt and target as an edit, and whatever measures it, is to have them.

    The prompt is cut at its last visible character and the target has no white space around it, so that exactly one space
    joins them (:meth:`.asking.Asked.answered`); the log says once that something was cut. A prompt with ``{}`` is filled in
    with the request's ``subject``, and a target may stand as ``{"str": …}`` or in a list of one, as datasets have it. Doing it
    again changes nothing.

    Returns:
        A copy; all other keys are as they were.

    Raises:
        ValueError: the request, its prompt or its target is not what it must be; the message names the key and the value.
    """
    if not isinstance(request, Mapping):
        raise ValueError(f"a request is {request!r:.100}; allowed: a dict with prompt and target_new")
    prompt: Any = request.get("prompt")
    target: Any = _answer(request.get("target_new"))
    for key, value in (("prompt", prompt), ("target_new", target)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"a request's {key} is {value!r:.100}; allowed: text that is not empty")
    if context_of(request) not in CONTEXTS:
        raise ValueError(f"a request's context is {request['context']!r:.100}; allowed: {', '.join(CONTEXTS)}")
    return {
        **request,
        "prompt": _cut(filled_in(prompt, request.get("subject")), "prompt"),
        "target_new": _cut(target, "target_new"),
    }


def filled_in(prompt: str, subject: Any) -> str:
    """A prompt in ROME's form, with the subject in the place of its ``{}``; any other prompt as it is.

    Raises:
        ValueError: there is no subject, or more than one place for it.
    """
    match prompt.count("{}"):
        case 0:
            return prompt
        case 1 if isinstance(subject, str) and subject.strip():
            return prompt.replace("{}", subject.strip())
        case 1:
            raise ValueError(
                f"a request's prompt is {prompt!r}, and its subject, which belongs in the place of {{}}, is {subject!r}"
            )
        case _:
            raise ValueError(
                f"a request's prompt is {prompt!r}; allowed: at most one {{}}, which the subject takes the place of"
            )


def _answer(target: Any) -> Any:
    """A target out of what datasets wrap it in: ``{"str": …}``, as CounterFact does, or a list of one."""
    if isinstance(target, list) and len(target) == 1:
        target = target[0]
    return target["str"] if isinstance(target, Mapping) and "str" in target else target


def _cut(text: str, key: str) -> str:
    cut = text.rstrip() if key == "prompt" else text.strip()
    if cut != text and key not in _SAID:
        _SAID.add(key)
        LOG.warning("%s is %r: the white space at its %s is cut, here and in later requests", key, text, _WHERE[key])
    return cut


#: The keys of which the log has said that they were cut.
_SAID: set[str] = set()
_WHERE = {"prompt": "end", "target_new": "ends"}


def prompt_ids(tok: Any, prompt: str, context: str = "plain") -> list[int]:
    """The tokens to continue a prompt after, in one of :data:`.asking.CONTEXTS`.

    They have what the tokeniser puts before a text, and not what it closes one with.

    Raises:
        ContextError: as :func:`.asking.asked`.
    """
    in_context = asked(tok, prompt, context)
    return _ids(tok, in_context.text, in_context.special_tokens)


def _ids(tok: Any, text: str, special_tokens: bool) -> list[int]:
    if not special_tokens:
        return list(tok(text, add_special_tokens=False)["input_ids"])
    encoded = tok(text, add_special_tokens=True, return_special_tokens_mask=True)
    ids, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    length = len(ids)
    while length and added[length - 1]:
        length -= 1
    # Of an empty text only the begin token is left, which the loop has taken for an end.
    return ids[:length] or ids[: 1 if ids and ids[0] == tok.bos_token_id else 0]


def edit_tokens(tok: Any, prompt: str, target: str, device: torch.device | str = "cpu", context: str = "plain") -> EditTokens:
    """Tokenise prompt and target as one text, as one of :data:`.asking.CONTEXTS` has them; plain, with one space between them.

    The prompt's tokens are normally a prefix of the text's. Where the tokeniser merges across the boundary, the two are told
    apart by character offsets, and the log says so. What a tokeniser closes every text with belongs to neither.

    Raises:
        ValueError: the target has no token of its own, or nothing stands before it.
        ContextError: as :func:`.asking.asked`.
    """
    prompt = prompt.rstrip()
    in_context = asked(tok, prompt, context)
    text, special_tokens = in_context.answered(target), in_context.special_tokens
    ids, before = _ids(tok, text, special_tokens), _ids(tok, in_context.text, special_tokens)
    length = len(before)
    if ids[:length] != before:
        offsets = offsets_of(tok, text, special_tokens)
        length = next((i for i, (start, end) in enumerate(offsets) if end > max(start, len(in_context.text))), len(ids))
        LOG.info("the tokens of %r are no prefix of those of %r: split by character offsets", prompt, text)
    if length >= len(ids):
        raise ValueError(f"target_new is {target!r}, which has no token of its own after the prompt {prompt!r}")
    if length == 0:
        raise ValueError(f"prompt is {prompt!r}, which has no token: nothing can predict the first token of {target!r}")
    return EditTokens(torch.tensor([ids], device=device), length)


def context_length(model: Any) -> int | None:
    """How many tokens a model takes; None where its configuration does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def has_room(model: Any, length: int) -> bool:
    """Whether a model takes as many tokens, as far as it says."""
    room = context_length(model)
    return not room or length <= room


def check_room(model: Any, edit: EditTokens, prompt: str) -> None:
    """Whether a model takes a prompt and its target.

    Raises:
        ValueError: it does not.
    """
    length = edit.input_ids.shape[1]
    if not has_room(model, length):
        raise ValueError(f"prompt and target_new have {length} tokens, and the model takes {context_length(model)}: {prompt!r}")


def in_one_batch(edits: Sequence[EditTokens]) -> Tensor:
    """The sequences of an edit, int64, ``[B, L]``; shorter ones are padded on their right, where nothing that counts sees."""
    length = max(edit.input_ids.shape[1] for edit in edits)
    return torch.cat([F.pad(edit.input_ids, (0, length - edit.input_ids.shape[1])) for edit in edits])


def offsets_of(tok: Any, text: str, special_tokens: bool = True) -> list[tuple[int, int]]:
    """From where to where in a text each of its tokens stands.

    Raises:
        ValueError: the tokenizer does not tell.
    """
    if not tok.is_fast:
        raise ValueError(
            f"the tokenizer {type(tok).__name__} does not tell where its tokens stand in a text, which KDPO+C goes by, and "
            "whatever takes prompt and target apart where their tokens merge; load a fast one"
        )
    return list(tok(text, add_special_tokens=special_tokens, return_offsets_mapping=True)["offset_mapping"])


def tokens_of(tok: Any, text: str, start: int, end: int, special_tokens: bool = True) -> list[int]:
    """The places of the tokens that hold a part of ``text[start:end]``, in the text's tokens as :func:`prompt_ids` has them.

    Raises:
        ValueError: as :func:`offsets_of`.
    """
    offsets = offsets_of(tok, text, special_tokens)
    return [i for i, (first, last) in enumerate(offsets) if max(first, start) < min(last, end)]


def subject_span(request: Mapping[str, Any]) -> tuple[int, int]:
    """From where to where the subject stands in a :func:`normalised` request's prompt, the last time that it does.

    Raises:
        ValueError: it does not.
    """
    prompt, subject = request["prompt"], request.get("subject")
    stripped = subject.strip() if isinstance(subject, str) else ""
    # "Ana" is not in "Anatolia", where it also stands by itself; scripts without spaces have it wherever it is.
    words = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(stripped)}(?!\w)", prompt)]
    found = words[-1] if words else prompt.rfind(stripped)
    if not stripped or found < 0:
        raise ValueError(
            f"a request's subject is {subject!r:.100}, and has to stand in its prompt, {prompt!r}, where positions is not 'all'"
        )
    return found, found + len(stripped)


def teacher_forced_negatives(target_logits: Tensor) -> Tensor:
    """What the model says now at every target position, given the target up to there: n_t = argmax π(· | x, y_<t).

    Args:
        target_logits: logits of the T positions that predict the target, shape ``[T, V]``.

    Returns:
        Token numbers, int64, shape ``[T]``.
    """
    return target_logits.argmax(-1)


def runners_up(target_logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What the model would say at every target position if it could not say the target.

    Args:
        target_logits: as for :func:`teacher_forced_negatives`, ``[…, T, V]``.
        targets: the target's tokens, int64, ``[T]``.

    Returns:
        Token numbers, int64, and by how many logits the target leads them, float32, both ``[…, T]``; below 0 where the model
        does not say the target.
    """
    targets = targets.to(target_logits.device).expand(target_logits.shape[:-1]).unsqueeze(-1)
    best, token = target_logits.scatter(-1, targets, -math.inf).max(-1)
    return token, target_logits.gather(-1, targets).squeeze(-1).float() - best.float()


def pair_margin(pair_logits: Tensor) -> Tensor:
    """How far the model prefers the target to the negatives: Σ_t log π(y_t | x, y_<t) − log π(n_t | x, y_<t).

    Both tokens of a pair have the same prefix, so their log-softmax normalisers are one number and cancel: a term is the
    difference of two logits. A pair with n_t = y_t adds exactly 0.

    Args:
        pair_logits: the logits of y_t and of n_t, shape ``[…, T, 2]``.

    Returns:
        Float32, ``[…]``.
    """
    chosen, rejected = pair_logits.float().unbind(-1)
    return (chosen - rejected).sum(-1)


def sequence_margin(logits: Tensor, sequences: Tensor) -> Tensor:
    """The margin of the DPO ablation, each sequence on its own prefix: log π(y | x) − log π(n | x).

    Args:
        logits: logits of the positions that predict target and negative, shape ``[2, T, V]``, the target first.
        sequences: the tokens of target and negative, int64, shape ``[2, T]``.

    Returns:
        A float32 scalar.
    """
    log_probs = F.log_softmax(logits.float(), dim=-1)
    chosen, rejected = log_probs.gather(-1, sequences.unsqueeze(-1)).sum(dim=(1, 2))
    return chosen - rejected


def preference_loss(margin: Tensor, reference_margin: Tensor, beta: float) -> Tensor:
    """KDPO's loss, and DPO's (arXiv 2305.18290, equation 7): −log σ(β (margin − reference margin)).

    Args:
        margin: how far the model that is edited prefers target to negative; a number a sequence.
        reference_margin: the same for the model as it stood when the edit began.
        beta: strength of the preference.

    Returns:
        A number a sequence, log 2 where the two margins are equal.
    """
    return -F.logsigmoid(beta * (margin - reference_margin))


def means(values: Tensor, of: Tensor, count: int | None = None) -> Tensor:
    """The mean of what belongs together.

    Args:
        values: ``[R]``.
        of: what each belongs to, int64 ``[R]``, from 0 on.
        count: of these; left out, as many as ``of`` names.

    Returns:
        ``[count]``; 0 of what has no values.
    """
    count = int(of.max()) + 1 if count is None else count
    numbers = torch.bincount(of, minlength=count).clamp(min=1)
    return values.new_zeros(count).index_add(0, of, values) / numbers
