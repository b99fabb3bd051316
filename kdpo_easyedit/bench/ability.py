"""What a model can still do: how well it reads ordinary text that no edit is about."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
import torch
from torch import Tensor

from ..method.preference import prompt_ids
from .answers import KOREAN_PARTICLE, WORD
from .batches import Batching, in_batches, logits_at, network, running
from .datasets import DatasetError
from .measuring import batching_for
from .significance import ratio_interval
from .tasks import Tasks

#: How much text is read, in tokens, and in passages of at most how many.
TOKENS, PASSAGE = 2000, 128
# Of every so many positions one is compared as a whole distribution, which takes room.
_EVERY = 32


def about_no_edit(texts: Sequence[str], requests: Iterable[Mapping[str, Any]]) -> list[str]:
    """The texts that do not name the subject of an edit: an edit is meant to change how a model reads those that do."""
    subjects = {re.sub(r"^(the|an?)\s+", "", request.get("subject") or "", flags=re.IGNORECASE).strip() for request in requests}
    subjects.discard("")
    if not subjects:
        return list(texts)
    # A word by itself, where words are parted by spaces.
    names = "|".join(map(regex.escape, subjects))
    named = regex.compile(rf"(?<!{WORD})(?:{names})(?:{KOREAN_PARTICLE})?(?!{WORD})", regex.V1)
    return [text for text in texts if not named.search(text)]


@dataclass(frozen=True)
class Reading:
    """How a model reads a text.

    Attributes:
        loss: of every token that is predicted, −log π(token | the passage up to there), in nats; float32, ``[N]``.
        distributions: log π of all tokens at every 32nd of a passage's; float32, ``[M, V]``, on the CPU.
        sizes: how many of either a passage has, in their order.
    """

    loss: Tensor
    distributions: Tensor
    sizes: Sequence[tuple[int, int]]

    @property
    def perplexity(self) -> float:
        """e to the mean loss; infinite where that is beyond all numbers."""
        return _exp(self.loss.double().mean().item())

    @property
    def perplexity_interval(self) -> list[float]:
        """Its 95 % confidence interval, by bootstrap over the passages."""
        positions = [size for size, _ in self.sizes]
        return [_exp(end) for end in ratio_interval([of.sum().item() for of in self.loss.split(positions)], positions)]

    def divergence(self, before: Reading) -> float:
        """The mean of KL(before ‖ this) over the compared positions, in nats: how far next-token distributions have moved."""
        return self._divergences(before).mean().item()

    def divergence_interval(self, before: Reading) -> list[float]:
        """Its 95 % confidence interval, by bootstrap over the passages."""
        compared = [size for _, size in self.sizes]
        return ratio_interval([of.sum().item() for of in self._divergences(before).split(compared)], compared)

    def _divergences(self, before: Reading) -> Tensor:
        old, new = before.distributions, self.distributions
        return (old.exp() * (old - new)).sum(-1)


def _exp(loss: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


def read(model: Any, tok: Any, texts: Sequence[str], tokens: int = TOKENS, batching: Batching = Batching()) -> Reading:
    """Let a model read passages, up to a number of tokens.

    Args:
        model: a causal language model, or what a method has wrapped around one.
        texts: passages, in the order in which they are read; one that is longer than :data:`PASSAGE` tokens is cut.

    Raises:
        ValueError: there is nothing to read.
    """
    passages: list[list[int]] = []
    for text in texts:
        ids = prompt_ids(tok, text)[:PASSAGE]  # without what a tokenizer closes every text with
        if len(ids) > 1:
            passages.append(ids)
        if sum(map(len, passages)) >= tokens:
            break
    if not passages:
        raise DatasetError("ability_text: it holds no passage of two tokens or more")
    device = network(model).device

    def run(batch: list[int]) -> list[tuple[Tensor, Tensor]]:
        width = max(len(passages[number]) for number in batch)
        ids, mask, wanted = (torch.zeros(len(batch), width, dtype=kind) for kind in (torch.long, torch.long, torch.bool))
        for row, number in enumerate(batch):
            length = len(passages[number])
            ids[row, :length], mask[row, :length], wanted[row, : length - 1] = torch.tensor(passages[number]), 1, True
        logits, _ = logits_at(model, {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, wanted)
        found, sizes = [], [len(passages[number]) - 1 for number in batch]
        for number, its in zip(batch, logits.split(sizes)):
            log_probs = its.float().log_softmax(-1)
            following = torch.tensor(passages[number][1:], device=log_probs.device).unsqueeze(-1)
            found.append((-log_probs.gather(-1, following).squeeze(-1).cpu(), log_probs[::_EVERY].cpu()))
        return found

    with running(model, batching):
        read = in_batches(run, list(map(len, passages)), batching.tokens or 512, 1 if batching.one_by_one else None)
    losses, distributions = zip(*read)
    return Reading(torch.cat(losses), torch.cat(distributions), [(len(a), len(b)) for a, b in read])


@dataclass(frozen=True)
class Ability:
    """What edited models are held against.

    Attributes:
        texts: what they read.
        before: how the unedited model read it; None without texts.
        tasks: what they are asked beside that.
    """

    texts: Sequence[str]
    before: Reading | None
    tasks: Tasks | None

    @classmethod
    def of(cls, model: Any, tok: Any, texts: Sequence[str], tasks: Tasks | None) -> Ability:
        """What a model that is not edited can do."""
        return cls(texts, read(model, tok, texts) if texts else None, tasks)

    def left_in(self, model: Any, tok: Any, edited: bool = True) -> dict[str, Any]:
        """What a model can do, as fields of a :class:`.schema.Summary`, with ``intervals``: its ``perplexity``, where it is
        edited its ``divergence`` from the unedited one, and its scores."""
        found: dict[str, Any] = self.tasks.measured(model, tok) if self.tasks else {"further": {}, "intervals": {}}
        if self.before:
            now = read(model, tok, self.texts, batching=batching_for(model)) if edited else self.before
            found["perplexity"] = round(now.perplexity, 4)
            if edited:
                found["divergence"] = round(now.divergence(self.before), 6)
            if len(now.sizes) > 1:  # an interval is a bootstrap over passages
                found["intervals"]["perplexity"] = [round(end, 4) for end in now.perplexity_interval]
                if edited:
                    found["intervals"]["divergence"] = [round(end, 6) for end in now.divergence_interval(self.before)]
        return found
