"""Qwen3-MoE: Qwen3's layers, most of them with a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorweave.kernels.mixture.routing import Routing
from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.decoder_layer import DecoderLayer, Mlp
from tensorweave.workers.models.families.experts import read_experts, read_sparse_layers
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.qwen2_moe import DEFAULT_WINDOW, QWEN_EXPERTS, QWEN_KEYS, read_qwen_routing
from tensorweave.workers.models.families.windows import read_layer_types, read_window
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.mixture import MixtureBuilder
from tensorweave.workers.models.sizes import ExpertSizes, LayerKv, ModelSizes


@dataclass(frozen=True, slots=True)
class Qwen3Mixture:
    experts: ExpertSizes
    routing: Routing

    def build(self, layer: LayerBuilder) -> Mlp:
        builder = MixtureBuilder(layer, self.experts)
        return builder.mixture(builder.routed_experts(QWEN_EXPERTS, self.routing))


@dataclass(frozen=True, slots=True)
class Qwen3MoeLayer:
    """`mixture` is None in a layer with a plain MLP."""

    kv: LayerKv
    has_attention_bias: bool
    mixture: Qwen3Mixture | None

    def build(self, layer: LayerBuilder) -> DecoderLayer:
        return DecoderLayer(
            attention_norm=layer.norm("input_layernorm"),
            attention=layer.attention(
                "self_attn",
                self.kv,
                has_qkv_bias=self.has_attention_bias,
                has_output_bias=self.has_attention_bias,
                norms=layer.head_norms("self_attn"),
            ),
            mlp_norm=layer.norm("post_attention_layernorm"),
            mlp=layer.gated_mlp("mlp", has_bias=False) if self.mixture is None else self.mixture.build(layer),
        )


def _read_experts(fields: ConfigFields) -> ExpertSizes:
    return read_experts(fields, fields.count("moe_intermediate_size"))


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[Qwen3MoeLayer, ...]:
    """With `use_sliding_window`, transformers' class gives every layer the window, whatever the other keys say."""
    assert sizes.experts is not None
    window = read_window(fields, DEFAULT_WINDOW) if fields.flag("use_sliding_window") else None
    windows = (window,) * sizes.num_layers
    if read_layer_types(fields, windows, window) != windows:
        raise fields.wrong("layer_types", "the same kind in every layer for Qwen3-MoE, as use_sliding_window says")
    mixture = Qwen3Mixture(sizes.experts, read_qwen_routing(fields, sizes.experts))
    return tuple(
        Qwen3MoeLayer(sizes.kv(window), fields.flag("attention_bias"), mixture if is_sparse else None)
        for is_sparse in read_sparse_layers(fields, sizes.num_layers)
    )


QWEN3_MOE: Final = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    keys=QWEN_KEYS | {"attention_bias"},
    layers=_read_layers,
    experts=_read_experts,
    default_kv_heads=4,
)
