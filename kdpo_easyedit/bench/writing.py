"""What a model writes by itself: answers, to where it stops of its own accord."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import regex
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..method.asking import end_tokens
from ..method.preference import context_length, prompt_ids
from .batches import (
    BY_DEVICE,
    Batching,
    MetricsError,
    in_batches,
    logits_at,
    network,
    running,
    takes_positions,
)


@dataclass(frozen=True)
class Text:
    """What was written after a prompt.

    Attributes:
        tokens: the tokens, without an end token.
        ended: whether it was ended, and not cut off where there was no more room.
        seconds: its share, by tokens, of the time that its batch took.
    """

    tokens: list[int]
    ended: bool
    seconds: float


@dataclass(frozen=True)
class Written:
    """An answer in the model's own words.

    Attributes:
        text: to the end of the line or the sentence, without space around it.
        stopped: whether the model stopped by itself: wrote an end token, or ended the line or the sentence.
        tokens: how many it wrote for it, those that showed the end among them.
        seconds: what they took; over many answers, the sum of tokens by that of seconds is the speed.
    """

    text: str
    stopped: bool
    tokens: int
    seconds: float


def write_answers(
    model: Any,
    tok: Any,
    prompts: Sequence[str],
    targets: Sequence[str],
    context: str = "plain",
    room: int = 32,
    batching: Batching = BY_DEVICE,
) -> list[Written]:
    """What a model answers, greedily, whatever its own settings for generation say; their end tokens end an answer.

    An answer ends with the line or the sentence, or where the target has several, with as many as it has.

    Args:
        model: a causal language model, or what a method has wrapped around one.
        prompts: what is asked; a space at the end, which tokenizers take for the beginning of a word, is left out.
        targets: what should be answered: an answer may be that long, and ``room`` tokens longer.
        context: how it is asked, one of :data:`.asking.CONTEXTS`.

    Raises:
        ContextError: a context that is not there or that the model has no template for.
        MetricsError: a prompt that it has no room for.
    """
    inputs = [prompt_ids(tok, prompt.rstrip(" "), context) for prompt in prompts]
    rooms = [len(tok(f" {target}", add_special_tokens=False)["input_ids"]) + room for target in targets]

    def decoded(tokens: list[int]) -> str:
        return tok.decode(tokens, skip_special_tokens=True)

    def has_ended(number: int, tokens: list[int]) -> bool:
        return _end(decoded(tokens), targets[number]) is not None

    texts = write_on(model, inputs, rooms, likeliest, has_ended, batching, end_tokens(network(model), tok))
    answers = []
    for text, target in zip(texts, targets):
        words = decoded(text.tokens)
        answers.append(Written(words[: _end(words, target)].strip(), text.ended, len(text.tokens), text.seconds))
    return answers


def likeliest(_prompts: list[int], _step: int, logits: Tensor) -> Tensor:
    """The choice of :func:`write_on` that is greedy."""
    return logits.argmax(-1)


# Where a line or a sentence ends. A full stop ends none after an initial or a title, nor after "No." before a number.
_STOP = regex.compile(
    r"""
    (?:[.!?…]{2,}|[!?…]|
       (?<!\b(?:\p{Lu}|Mrs?|Ms|Dr|Prof|St|Ste|Mt|Ft|Rev|Gen|Col|Capt|Lt|Sgt|Gov|Sen|Rep|Hon|Pres)
          |\b(?:Nos?|Vol|Op|pp?)(?=\.\s*\d))\.)
    ["”’')\]*]*(?=\s+[^\s\p{Ll}])
    |[。！？｡।॥؟۔։]+[”」』）»]*
    |(?=[\n\r])
    """,
    regex.VERBOSE,
)


def _ends(text: str) -> list[int]:
    """Where the lines and sentences of a text end, as far as what follows shows it."""
    return [match.end() for match in _STOP.finditer(text)]


def _end(text: str, target: str) -> int | None:
    """Where an answer ends: at the first end of a line or sentence, or after as many as the target has within it."""
    start = len(text) - len(text.lstrip())
    target = target.strip()
    within = sum(end < len(target) for end in _ends(target))
    ends = [end for end in _ends(text) if end > start]
    return ends[within] if len(ends) > within else None


# --------------------------------------------------------------------------------------------------------------------


def write_on(
    model: Any,
    prompts: Sequence[list[int]],
    rooms: Sequence[int],
    choose: Callable[[list[int], int, Tensor], Tensor],
    has_ended: Callable[[int, list[int]], bool] = lambda _prompt, _tokens: False,
    batching: Batching = BY_DEVICE,
    end_tokens: frozenset[int] = frozenset(),
) -> list[Text]:
    """Go on from prompts, token by token, in batches with a cache of keys and values; texts that have ended leave the batch.

    Args:
        prompts: their tokens.
        rooms: how many tokens to write after each at most; never more than the model takes.
        choose: the next tokens, int64 ``[R]``, given the numbers of R prompts, how many tokens each has had, and the logits
            ``[R, V]``.
        has_ended: whether a text has come to its end, given the prompt's number and the text's tokens.
        end_tokens: those that end a text.

    Raises:
        MetricsError: a prompt without tokens, or one that the model has no room for.
    """
    limit = context_length(network(model))
    for number, ids in enumerate(prompts):
        if not ids or (limit and len(ids) > limit):
            most = f"takes {limit} at most" if ids else "needs one to begin with"
            raise MetricsError(f"prompt {number} has {len(ids)} tokens, and the model {most}; change it or leave it out")
    # One token more than the model takes can be written: nothing is read after it.
    rooms = [max(1, min(room, limit - len(ids) + 1)) if limit else room for ids, room in zip(prompts, rooms)]
    device = network(model).device
    rows = 1 if batching.one_by_one else batching.rows or (64 if device.type == "cpu" else 256)

    def run(batch: list[int]) -> list[Text]:
        if batching.one_by_one and batching.decide_at:
            batching.decide_at(model, -1)
        started = time.perf_counter()
        of_batch = {number: prompts[number] for number in batch}
        written = _write_batch(model, of_batch, rooms, choose, has_ended, end_tokens, batching.rows_are)
        each = (time.perf_counter() - started) / max(1, sum(len(tokens) for tokens, _ in written.values()))
        return [Text(tokens, ended, each * len(tokens)) for tokens, ended in (written[number] for number in batch)]

    with running(model, batching):
        return in_batches(run, [len(ids) for ids in prompts], rows=rows)


def _write_batch(
    model: Any,
    prompts: dict[int, list[int]],
    rooms: Sequence[int],
    choose: Callable[[list[int], int, Tensor], Tensor],
    has_ended: Callable[[int, list[int]], bool],
    end_tokens: frozenset[int],
    rows_are: Callable[[Sequence[int]], None] | None,
) -> dict[int, tuple[list[int], bool]]:
    """Of every prompt's number, the tokens written after it and whether they were ended."""
    device, positions = network(model).device, takes_positions(model)
    width = max(map(len, prompts.values()))
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts.values()])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts.values()])
    past = None
    live = list(prompts)
    written: dict[int, tuple[list[int], bool]] = {number: ([], False) for number in prompts}
    for step in range(max(rooms[number] for number in prompts)):
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if positions:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        given = {name: tensor.to(device) for name, tensor in given.items()}
        if rows_are:
            rows_are(live)
        last = torch.zeros(input_ids.shape, dtype=torch.bool)
        last[:, -1] = True
        logits, output = logits_at(model, given | {"past_key_values": past, "use_cache": True}, last)
        past = output.past_key_values
        chosen = choose(live, step, logits).tolist()
        going = []
        for row, (number, token) in enumerate(zip(live, chosen)):
            tokens = written[number][0]
            ended = token in end_tokens
            if not ended:
                tokens.append(token)
                ended = has_ended(number, tokens)
            written[number] = tokens, ended
            if not ended and len(tokens) < rooms[number]:
                going.append(row)
        if not going:
            break
        input_ids = torch.tensor([[chosen[row]] for row in going])
        if len(going) < len(live):
            past.batch_select_indices(torch.tensor(going, device=device))
            live, mask = [live[row] for row in going], mask[going]
        mask = torch.cat([mask, torch.ones_like(input_ids)], dim=1)
        for layer in getattr(past, "layers", ()):
            if type(layer) is DynamicLayer:
                layer.__class__ = _Roomy
    return written


class _Roomy(DynamicLayer):
    """A layer's keys and values with room for more: its parent copies all of them for every token that is added."""

    ROOM = 64
    _room: list[Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        kept: tuple[Any, Any] = self.keys, self.values
        held = kept[0].shape[-2]
        end = held + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end:
            shapes = ((*of.shape[:-2], end + self.ROOM, of.shape[-1]) for of in kept)
            self._room = [of.new_empty(shape) for of, shape in zip(kept, shapes)]
            held = 0
            key_states, value_states = (torch.cat(of, dim=-2) for of in zip(kept, (key_states, value_states)))
        for room, states in zip(self._room, (key_states, value_states)):
            room[..., held:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._room = None
