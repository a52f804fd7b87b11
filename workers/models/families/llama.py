"""Llama, and what has its form: SmolLM2, Yi, TinyLlama and others.

Every layer attends to all positions. `attention_bias` gives all four projections of the attention a bias, `mlp_bias`
the three of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.decoder_layer import DecoderLayer, Mlp
from tensorweave.workers.models.families.experts import MixtureDesign
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.windows import WINDOW_KEYS
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.sizes import LayerKv, ModelSizes


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """Also Mistral's, Qwen's and gpt-oss's, which differ in windows, biases, norms of heads, sinks and experts.
    `mixture` stands in place of the MLP."""

    kv: LayerKv
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_head_norms: bool = False
    has_sinks: bool = False
    mixture: MixtureDesign | None = None

    def build(self, layer: LayerBuilder) -> DecoderLayer:
        return DecoderLayer(
            attention_norm=layer.norm("input_layernorm"),
            attention=layer.attention(
                "self_attn",
                self.kv,
                has_qkv_bias=self.has_qkv_bias,
                has_output_bias=self.has_output_bias,
                norms=layer.head_norms("self_attn") if self.has_head_norms else None,
                has_sinks=self.has_sinks,
            ),
            mlp_norm=layer.norm("post_attention_layernorm"),
            mlp=self._mlp(layer),
        )

    def _mlp(self, layer: LayerBuilder) -> Mlp:
        if self.mixture is None:
            return layer.gated_mlp("mlp", has_bias=self.has_mlp_bias)
        return self.mixture.build(layer)


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[LlamaLayer, ...]:
    _refuse_windows(fields)
    bias = fields.flag("attention_bias")
    layer = LlamaLayer(sizes.kv(), has_qkv_bias=bias, has_output_bias=bias, has_mlp_bias=fields.flag("mlp_bias"))
    return (layer,) * sizes.num_layers


def _refuse_windows(fields: ConfigFields) -> None:
    """transformers' LlamaForCausalLM reads neither key; a window that no position leaves changes nothing."""
    window = fields.raw.get("sliding_window")
    if window and window < fields.count("max_position_embeddings"):
        raise fields.wrong("sliding_window", "null for Llama")
    if set(fields.raw.get("layer_types") or ()) - {"full_attention"}:
        raise fields.wrong("layer_types", "full_attention in every layer for Llama")


LLAMA: Final = Family(
    "LlamaForCausalLM", "llama", keys=WINDOW_KEYS | {"attention_bias", "mlp_bias"}, layers=_read_layers
)
