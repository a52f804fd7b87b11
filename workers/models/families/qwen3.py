"""Qwen3 (dense): an RMSNorm over each query and key head before it is rotated; `attention_bias` as Llama's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.decoder_layer import DecoderLayer
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.windows import WINDOW_KEYS, read_late_windows
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.sizes import LayerKv, ModelSizes

_DEFAULT_WINDOW: Final = 4096


@dataclass(frozen=True, slots=True)
class Qwen3Layer:
    kv: LayerKv
    has_attention_bias: bool

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
            mlp=layer.gated_mlp("mlp", has_bias=False),
        )


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[Qwen3Layer, ...]:
    fields.require("mlp_bias", False, "qwen3")
    has_bias = fields.flag("attention_bias")
    windows = read_late_windows(fields, sizes.num_layers, _DEFAULT_WINDOW)
    return tuple(Qwen3Layer(sizes.kv(window), has_bias) for window in windows)


QWEN3: Final = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    keys=WINDOW_KEYS | {"attention_bias", "mlp_bias"},
    layers=_read_layers,
    default_kv_heads=32,
    default_head_dim=128,
)
