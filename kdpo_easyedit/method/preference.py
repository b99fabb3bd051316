"""What KDPO prefers to what: tokens, negatives and the loss, as pure functions of tensors.

T is the number of target tokens, V the size of the vocabulary. Everything follows section 3 of the paper
(arXiv 2406.09920); nothing here knows of EasyEdit.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def edit_tokens(tok: Any, prompt: str, target: str, device: torch.device | str = "cpu") -> EditTokens:
    """Tokenise prompt and target as one text, with one space between them.

    The prompt's tokens are normally a prefix of the text's. Where the tokeniser merges across the boundary (or closes
    every text with a special token), the two are told apart by character offsets, and the log says so.

    Raises:
        ValueError: the target has no token of its own, or nothing stands before it.
    """
    text = prompt + (target if target.startswith(" ") else " " + target)
    ids: list[int] = tok(text)["input_ids"]
    prompt_ids: list[int] = tok(prompt)["input_ids"]
    length = len(prompt_ids)
    if ids[:length] != prompt_ids:
        offsets = tok(text, return_offsets_mapping=True)["offset_mapping"]
        in_target = [i for i, (start, end) in enumerate(offsets) if end > max(start, len(prompt))]
        length = in_target[0] if in_target else len(ids)
        ids = ids[: in_target[-1] + 1] if in_target else ids
        LOG.info("the tokens of %r are no prefix of those of %r: split by character offsets", prompt, text)
    if length == len(ids):
        raise ValueError(f"target_new is {target!r}, which has no token of its own after the prompt {prompt!r}")
    if length == 0:
        raise ValueError(f"prompt is {prompt!r}, which has no token: nothing can predict the first token of {target!r}")
    return EditTokens(torch.tensor([ids], device=device), length)


def teacher_forced_negatives(target_logits: Tensor) -> Tensor:
    """What the model says now at every target position, given the target up to there: n_t = argmax π(· | x, y_<t).

    Args:
        target_logits: logits of the T positions that predict the target, shape ``[T, V]``.

    Returns:
        Token numbers, int64, shape ``[T]``.
    """
    return target_logits.argmax(-1)


def pair_margin(pair_logits: Tensor) -> Tensor:
    """How far the model prefers the target to the negatives: Σ_t log π(y_t | x, y_<t) − log π(n_t | x, y_<t).

    Both tokens of a pair have the same prefix, so their log-softmax normalisers are one number and cancel: a term is the
    difference of two logits. A pair with n_t = y_t adds exactly 0.

    Args:
        pair_logits: the logits of y_t and of n_t, shape ``[T, 2]``.

    Returns:
        A float32 scalar.
    """
    chosen, rejected = pair_logits.float().unbind(-1)
    return (chosen - rejected).sum()


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
        margin: how far the model that is edited prefers target to negative; scalar.
        reference_margin: the same for the model as it stood when the edit began; scalar.
        beta: strength of the preference.

    Returns:
        A scalar, log 2 where the two margins are equal.
    """
    return -F.logsigmoid(beta * (margin - reference_margin))
