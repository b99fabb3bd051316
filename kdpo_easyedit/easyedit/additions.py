"""Methods that EasyEdit lacks, to compare with: fine-tuning as it is otherwise done, and edits put before the prompt."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import regex
import torch
from torch import nn

from ..method.preference import context_length
from .host import ALG_DICT, IS_RELEASE, easyeditor, submodule

Request = Mapping[str, Any]


def register() -> None:
    """Add them to EasyEdit's methods; LocFT-BF where its FT knows the objective that it needs. Again changes nothing."""
    ALG_DICT["Retrieval"], easyeditor.RetrievalHyperParams = apply_retrieval_to_model, RetrievalHyperParams
    if not IS_RELEASE:
        ALG_DICT["LocFT-BF"] = apply_locft_bf_to_model
        easyeditor.LocFTBFHyperParams = submodule("models.ft").FTHyperParams


def apply_locft_bf_to_model(
    model: Any, tok: Any, requests: Sequence[Request], hparams: Any, **keywords: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """LocFT-BF (arXiv 2509.22072): FT-M of all edits together, epoch by epoch in mini-batches, with the end token learnt.

    EasyEdit's FT does that when it is given several requests and a ``batch_size``, which is that of the mini-batches; unlike
    the paper's code (github.com/ICT-STAR/LocFT) it does not shuffle them. That code gives the model a token to pad with; here
    it is any token that is not in the texts, since FT tells padding by its token and would take the end of an answer for it.

    Returns:
        The model, and the weights that were changed, as they were.
    """
    requests = [{**request, "target_new": f"{request['target_new']}{tok.eos_token}"} for request in requests]
    used = {token for request in requests for token in tok(_sentence(request))["input_ids"]}
    tok = copy.deepcopy(tok)
    tok.pad_token = tok.convert_ids_to_tokens(next(token for token in range(len(used) + 1) if token not in used))
    return ALG_DICT["FT"](model, tok, requests, hparams, **keywords)


# --------------------------------------------------------------------------------------------------------------------


@dataclass
class RetrievalHyperParams:
    """How :class:`Retrieval` chooses edits.

    Attributes:
        k: how many are put before a prompt at most.
        threshold: the similarity, from 0 to 1, that they must have at least.
    """

    alg_name: str
    model_name: Any
    device: Any = field(default="cpu")
    k: int = 1
    threshold: float = 0.0
    model_parallel: bool = False


class Retrieval(nn.Module):
    """A model whose prompts have the edits that are most like them put before them; its weights stay as they are.

    In-context editing in its plainest form, after IKE (arXiv 2305.12740), which chooses demonstrations from a training set in
    the same way: edits stand before the prompt as sentences, a line each, the most similar last. Similarity is the cosine of
    tf-idf vectors of words, with document frequencies over the edits: no second model is needed.

    Prompts go one at a time. What is asked of is a prompt's tokens as far as ``key_id``, -1 for all that is given.
    """

    changes_no_weights = True

    #: Room that is left for what the model writes after a prompt, in tokens.
    ROOM = 128

    def __init__(self, model: Any, tok: Any, edits: Sequence[Request], hparams: RetrievalHyperParams) -> None:
        super().__init__()
        self.model, self.tok, self.hparams, self.config = model, tok, hparams, model.config
        self.edits = [*{edit["prompt"]: edit for edit in edits}.values()]  # the latest of those with the same prompt
        self.key_id = -1
        self._bags = [_words(edit["prompt"]) for edit in self.edits]
        self._in = Counter(word for bag in self._bags for word in bag)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def similar(self, text: str) -> list[Request]:
        """The edits that are put before a text, the most similar last."""
        asked = _words(text)
        scores = [self._cosine(asked, bag) for bag in self._bags]
        order = sorted(range(len(scores)), key=lambda number: (-scores[number], -number))[: self.hparams.k]
        return [self.edits[number] for number in reversed(order) if scores[number] >= self.hparams.threshold]

    def _cosine(self, one: Counter[str], other: Counter[str]) -> float:
        def weight(word: str) -> float:
            return math.log((1 + len(self.edits)) / (1 + self._in[word])) + 1

        def norm(bag: Counter[str]) -> float:
            return math.hypot(*(count * weight(word) for word, count in bag.items()))

        common = sum(one[word] * other[word] * weight(word) ** 2 for word in one.keys() & other.keys())
        return common / (norm(one) * norm(other)) if common else 0.0

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **keywords: Any,
    ) -> Any:
        """The model's output on ``input_ids``, int64 ``[1, L]``; masks and positions follow from what stands before them."""
        held = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not held and (before := self._before(input_ids[0])):
            told = torch.tensor([before], device=input_ids.device)
            past_key_values, held = self.model.base_model(input_ids=told, use_cache=True).past_key_values, len(before)
        if not held:
            return self.model(input_ids=input_ids, past_key_values=past_key_values, **keywords)
        length = input_ids.shape[1]
        return self.model(
            input_ids=input_ids,
            attention_mask=input_ids.new_ones(1, held + length),
            position_ids=torch.arange(held, held + length, device=input_ids.device).unsqueeze(0),
            past_key_values=past_key_values,
            **keywords,
        )

    def _before(self, ids: torch.Tensor) -> list[int]:
        """The tokens to put before a sequence; fewer edits where the model would have no room."""
        asked = ids if self.key_id == -1 else ids[: self.key_id + 1]
        chosen = self.similar(self.tok.decode(asked, skip_special_tokens=True))
        limit = context_length(self) or math.inf
        while chosen:
            lines = "".join(f"{_sentence(edit)}.\n" for edit in chosen)
            before: list[int] = self.tok(lines)["input_ids"]
            if len(before) + len(ids) + self.ROOM <= limit:
                return before
            chosen = chosen[1:]
        return []


def apply_retrieval_to_model(
    model: Any, tok: Any, requests: Sequence[Request], hparams: RetrievalHyperParams, **_: Any
) -> tuple[Retrieval, dict[str, torch.Tensor]]:
    """Remember edits: the model with these and those that it had, in a :class:`Retrieval`, and no changed weights."""
    had, network = (model.edits, model.model) if isinstance(model, Retrieval) else ([], model)
    return Retrieval(network, tok, [*had, *requests], hparams), {}


def _sentence(edit: Request) -> str:
    return f"{edit['prompt'].rstrip()} {edit['target_new'].lstrip()}"


def _words(text: str) -> Counter[str]:
    return Counter(regex.findall(r"\p{L}[\p{L}\p{M}]*|\p{N}+", text.lower()))
