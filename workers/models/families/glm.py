"""GLM-4 of both generations: neighbouring elements of half of each head are rotated together, q, k and v have biases,
and gates and ups are in one tensor. The later one (0414) has norms behind attention and MLP as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.decoder_layer import DecoderLayer
from tensorweave.workers.models.families.family import Family, ReadLayers
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.residual import UNCHANGED
from tensorweave.workers.models.rope_config import RopeConfig, RopeDefaults
from tensorweave.workers.models.sizes import LayerKv, ModelSizes


@dataclass(frozen=True, slots=True)
class GlmLayer:
    kv: LayerKv
    has_qkv_bias: bool
    has_norms_behind: bool

    def build(self, layer: LayerBuilder) -> DecoderLayer:
        return DecoderLayer(
            attention_norm=layer.norm("input_layernorm"),
            attention=layer.attention(
                "self_attn", self.kv, has_qkv_bias=self.has_qkv_bias, has_output_bias=False, has_neighbours=True
            ),
            after_attention=layer.norm("post_self_attn_layernorm") if self.has_norms_behind else UNCHANGED,
            mlp_norm=layer.norm("post_attention_layernorm"),
            mlp=layer.fused_mlp("mlp"),
            after_mlp=layer.norm("post_mlp_layernorm") if self.has_norms_behind else UNCHANGED,
        )


def _read_first(fields: ConfigFields, sizes: ModelSizes) -> tuple[GlmLayer, ...]:
    return _read_layers(fields, sizes, has_norms_behind=False)


def _read_second(fields: ConfigFields, sizes: ModelSizes) -> tuple[GlmLayer, ...]:
    return _read_layers(fields, sizes, has_norms_behind=True)


def _read_layers(fields: ConfigFields, sizes: ModelSizes, *, has_norms_behind: bool) -> tuple[GlmLayer, ...]:
    fields.require("mlp_bias", False, "glm4")
    [rope] = _read_ropes(fields)
    if rope.width(sizes.head_dim) % 2:
        raise fields.wrong("partial_rotary_factor", f"an even part of head_dim ({sizes.head_dim})")
    return (GlmLayer(sizes.kv(), fields.flag("attention_bias"), has_norms_behind),) * sizes.num_layers


def _read_ropes(fields: ConfigFields) -> tuple[RopeConfig, ...]:
    max_len = fields.count("max_position_embeddings")
    return (RopeConfig.from_hf(fields.raw, max_len, fields.source, RopeDefaults(part=0.5)),)


def _family(architecture: str, model_type: str, layers: ReadLayers) -> Family:
    return Family(
        architecture,
        model_type,
        keys=frozenset({"attention_bias", "mlp_bias"}),
        layers=layers,
        default_kv_heads=2,
        default_head_dim=128,
        defaults={"attention_bias": True, "rms_norm_eps": 1.5625e-7},
        ropes=_read_ropes,
    )


GLM: Final = _family("GlmForCausalLM", "glm", _read_first)
GLM4: Final = _family("Glm4ForCausalLM", "glm4", _read_second)
