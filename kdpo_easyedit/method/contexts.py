"""Texts to stand before an edit's prompt: what the model itself writes, so that the fact is learnt in more than one place."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..once import once
from .preference import prompt_ids
from .replay import frozen
from .weights import runs_on

_START, _TOKENS = "The", 10

# Of every model, the texts that it has written, by their number.
_WRITTEN: WeakKeyDictionary[nn.Module, dict[int, list[str]]] = WeakKeyDictionary()


def contexts(model: PreTrainedModel, tok: Any, number: int) -> list[str]:
    """Texts of ten tokens or so, sampled from the model with a fixed seed when first asked for, and kept as long as it is."""
    written = _WRITTEN.setdefault(model, {})
    if number and number not in written:
        written[number] = [" ".join(text.split()) for text in _write(model, tok, number)]
    return written.get(number, [])


def copy_contexts(model: nn.Module, copy: nn.Module) -> None:
    """Let a model's copy have the model's texts."""
    if model in _WRITTEN:
        _WRITTEN[copy] = dict(_WRITTEN[model])


@once
def _write(model: PreTrainedModel, tok: Any, number: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)

    def drawn(logits: Tensor) -> Tensor:
        """Drawn on the CPU in float32, so that a seed means the same everywhere: ``[B, L, V]`` → ``[B, 1]``."""
        # A model whose logits are no numbers is told by the edit, which says where.
        found = logits[:, -1].float().cpu().nan_to_num(0.0, 1e4, -1e4)
        return torch.multinomial(found.softmax(-1), 1, generator=generator)

    device = runs_on(model.get_input_embeddings())
    with torch.no_grad(), frozen(model):
        tokens = [torch.tensor([prompt_ids(tok, _START)] * number)]
        output = model(input_ids=tokens[0].to(device), use_cache=True)
        while True:
            tokens.append(drawn(output.logits))
            if len(tokens) > _TOKENS:
                return list(tok.batch_decode(torch.cat(tokens, dim=-1), skip_special_tokens=True))
            output = model(input_ids=tokens[-1].to(device), past_key_values=output.past_key_values, use_cache=True)
