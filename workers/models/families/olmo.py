"""OLMo 2 and 3: no norms before attention and MLP but behind them, and norms over all query heads, and all key heads,
together. OLMo 3 has windows in three layers of four, which are rotated without the scaling of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.decoder_layer import DecoderLayer
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.layer_kinds import read_kinds, ropes_of_kinds
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.residual import ResidualSum
from tensorweave.workers.models.rope_config import RopeConfig, RopeDefaults
from tensorweave.workers.models.sizes import LayerKv, ModelSizes


@dataclass(frozen=True, slots=True)
class OlmoLayer:
    kv: LayerKv
    has_attention_bias: bool

    def build(self, layer: LayerBuilder) -> DecoderLayer:
        bias = self.has_attention_bias
        return DecoderLayer(
            attention_norm=ResidualSum(),
            attention=layer.attention(
                "self_attn", self.kv, qkv=layer.normed_qkv("self_attn", self.kv, has_bias=bias), has_output_bias=bias
            ),
            after_attention=layer.norm("post_attention_layernorm"),
            mlp_norm=ResidualSum(),
            mlp=layer.gated_mlp("mlp"),
            after_mlp=layer.norm("post_feedforward_layernorm"),
        )


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[OlmoLayer, ...]:
    fields.require("mlp_bias", False, "olmo2")
    return (OlmoLayer(sizes.kv(), fields.flag("attention_bias")),) * sizes.num_layers


OLMO2: Final = Family(
    "Olmo2ForCausalLM",
    "olmo2",
    keys=frozenset({"attention_bias", "mlp_bias"}),
    layers=_read_layers,
    defaults={"rms_norm_eps": 1e-5},
)


def _read_mixed_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[OlmoLayer, ...]:
    fields.require("mlp_bias", False, "olmo3")
    bias = fields.flag("attention_bias")
    return tuple(OlmoLayer(kv, bias) for kv in read_kinds(fields, sizes, full_every=4))


def _read_ropes(fields: ConfigFields) -> tuple[RopeConfig, ...]:
    return ropes_of_kinds(fields, full=RopeDefaults(500_000.0), sliding=RopeDefaults(500_000.0))


OLMO3: Final = Family(
    "Olmo3ForCausalLM",
    "olmo3",
    keys=frozenset({"attention_bias", "layer_types", "mlp_bias", "sliding_window"}),
    layers=_read_mixed_layers,
    defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
    ropes=_read_ropes,
)
