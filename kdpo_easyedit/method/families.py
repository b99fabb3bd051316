"""Where the models of a family keep the parts that editing methods name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """Module names, with ``{}`` in the place of a layer's number.

    Attributes:
        layer: a decoder layer.
        mlp: its MLP.
        projection: the MLP's output projection: W.
        attention: its attention.
        final_norm: the norm before the output layer.
    """

    layer: str
    mlp: str
    projection: str
    attention: str
    final_norm: str


def _family(layer: str, mlp: str, projection: str, attention: str, final_norm: str) -> Family:
    return Family(layer, f"{layer}.{mlp}", f"{layer}.{mlp}.{projection}", f"{layer}.{attention}", final_norm)


LLAMA = _family("model.layers.{}", "mlp", "down_proj", "self_attn", "model.norm")  # Mistral, Qwen, Gemma, SmolLM as well
GPT2 = _family("transformer.h.{}", "mlp", "c_proj", "attn", "transformer.ln_f")
FAMILIES = (
    LLAMA,
    GPT2,
    _family("transformer.h.{}", "mlp", "fc_out", "attn", "transformer.ln_f"),  # GPT-J
    _family("gpt_neox.layers.{}", "mlp", "dense_4h_to_h", "attention", "gpt_neox.final_layer_norm"),
    _family("transformer.h.{}", "mlp", "dense_4h_to_h", "self_attention", "transformer.ln_f"),  # Falcon, BLOOM
    _family("model.layers.{}", "mlp", "fc2", "self_attn", "model.final_layernorm"),  # Phi
    _family("model.layers.{}", "mlp", "c_proj", "self_attn", "model.norm"),  # StarCoder2
    _family("model.layers.{}", "feed_forward", "w2", "attention", "model.norm"),  # InternLM2
)


def family_of(model: nn.Module) -> Family | None:
    """The family that a model's modules are named like; None where it is none of :data:`FAMILIES`."""
    names = {name for name, _ in model.named_modules()}
    return next((f for f in FAMILIES if f.projection.format(0) in names and f.final_norm in names), None)


def output_layer_of(model: nn.Module) -> str:
    """The name of the module that holds the output layer's weight: of an output layer that is tied, the embedding."""
    weight = model.get_output_embeddings().weight  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if getattr(module, "weight", None) is weight)
