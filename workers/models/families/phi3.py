"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: queries, keys and values in one tensor, gates and ups in another; windows in
every layer; part of each head rotated, with longrope's two sets of factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.decoder_layer import DecoderLayer
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.windows import read_window
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.rope_config import RopeConfig
from tensorweave.workers.models.sizes import LayerKv, ModelSizes


@dataclass(frozen=True, slots=True)
class Phi3Layer:
    kv: LayerKv

    def build(self, layer: LayerBuilder) -> DecoderLayer:
        return DecoderLayer(
            attention_norm=layer.norm("input_layernorm"),
            attention=layer.attention(
                "self_attn", self.kv, qkv=layer.fused_qkv("self_attn", self.kv), has_output_bias=False
            ),
            mlp_norm=layer.norm("post_attention_layernorm"),
            mlp=layer.fused_mlp("mlp"),
        )


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[Phi3Layer, ...]:
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.require(key, False, "phi3")
    [rope] = _read_ropes(fields)
    width = rope.width(sizes.head_dim)
    factors = {len(each) for each in (rope.short_factors, rope.long_factors)} - {0}
    if width % 2 or factors - {width // 2}:
        raise ValueError(
            f"{fields.source}: partial_rotary_factor {rope.part:g} of a head_dim of {sizes.head_dim} with lists of "
            f"{sorted(factors)} factors; supported: an even part, and a factor for each of its pairs"
        )
    window = read_window(fields, None)
    if window is not None and window >= fields.count("max_position_embeddings"):
        window = None  # no position leaves it
    return (Phi3Layer(sizes.kv(window)),) * sizes.num_layers


def _read_ropes(fields: ConfigFields) -> tuple[RopeConfig, ...]:
    """Old checkpoints call longrope 'su' or 'yarn'."""
    raw = {**fields.raw, **{key: _modern(fields.raw.get(key)) for key in ("rope_parameters", "rope_scaling")}}
    rope = RopeConfig.from_hf(raw, fields.count("max_position_embeddings"), fields.source)
    if rope.kind not in ("default", "longrope"):
        raise fields.wrong("rope_scaling", "longrope for this architecture")
    return (rope,)


def _modern(scaling: Any) -> Any:
    if not isinstance(scaling, Mapping):
        return scaling
    old = {key: "longrope" for key in ("type", "rope_type") if scaling.get(key) in ("su", "yarn")}
    return {**scaling, **old}


PHI3: Final = Family(
    "Phi3ForCausalLM",
    "phi3",
    keys=frozenset(
        {"attention_bias", "lm_head_bias", "mlp_bias", "original_max_position_embeddings", "sliding_window"}
    ),
    layers=_read_layers,
    defaults={"rms_norm_eps": 1e-5},
    ropes=_read_ropes,
    own_code=frozenset({"modeling_phi3.Phi3ForCausalLM"}),
)
