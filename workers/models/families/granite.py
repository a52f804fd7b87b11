"""Granite 3 and 4 (dense): Llama's layers with four factors: of embeddings, scores, what layers add, and logits.

Granite 4's dense models are of the architecture of its hybrids, without their recurrent layers and experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.workers.models.config import ModelEnds
from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.decoder_layer import DecoderLayer
from tensorweave.workers.models.families.family import Family, one_rope
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.residual import Scaled
from tensorweave.workers.models.rope_config import RopeConfig
from tensorweave.workers.models.sizes import LayerKv, ModelSizes

_FACTORS: Final = frozenset({"attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"})


@dataclass(frozen=True, slots=True)
class GraniteLayer:
    """`has_shared_mlp`: the tensors of the MLP are named as those of an expert that all tokens share."""

    kv: LayerKv
    scale: float
    update_factor: float
    has_attention_bias: bool
    has_mlp_bias: bool
    has_shared_mlp: bool = False

    def build(self, layer: LayerBuilder) -> DecoderLayer:
        bias, factor = self.has_attention_bias, Scaled(self.update_factor)
        return DecoderLayer(
            attention_norm=layer.norm("input_layernorm"),
            attention=layer.attention("self_attn", self.kv, has_qkv_bias=bias, has_output_bias=bias, scale=self.scale),
            after_attention=factor,
            mlp_norm=layer.norm("post_attention_layernorm"),
            mlp=(
                layer.fused_mlp("shared_mlp", "input_linear", "output_linear")
                if self.has_shared_mlp
                else layer.gated_mlp("mlp", has_bias=self.has_mlp_bias)
            ),
            after_mlp=factor,
        )


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[GraniteLayer, ...]:
    return (_read_layer(fields, sizes),) * sizes.num_layers


def _read_layer(fields: ConfigFields, sizes: ModelSizes, *, has_shared_mlp: bool = False) -> GraniteLayer:
    return GraniteLayer(
        sizes.kv(),
        scale=fields.number("attention_multiplier", 1.0),
        update_factor=fields.number("residual_multiplier", 1.0),
        has_attention_bias=fields.flag("attention_bias"),
        has_mlp_bias=fields.flag("mlp_bias"),
        has_shared_mlp=has_shared_mlp,
    )


def _read_ends(fields: ConfigFields, sizes: ModelSizes) -> ModelEnds:
    return ModelEnds(
        embedding_factor=fields.number("embedding_multiplier", 1.0),
        logit_factor=1 / fields.number("logits_scaling", 1.0),
    )


GRANITE: Final = Family(
    "GraniteForCausalLM",
    "granite",
    keys=_FACTORS | {"attention_bias", "mlp_bias"},
    layers=_read_layers,
    ends=_read_ends,
)


def _read_hybrid_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[GraniteLayer, ...]:
    types = fields.raw.get("layer_types")
    if not isinstance(types, list) or len(types) != sizes.num_layers or set(types) - {"attention", "full_attention"}:
        raise fields.wrong("layer_types", "attention in every layer: recurrent layers (Mamba) are not computed here")
    if fields.raw["num_local_experts"] != 0:
        raise fields.wrong("num_local_experts", "0: of this architecture, dense models")
    if fields.raw.get("normalization_function", "rmsnorm") != "rmsnorm":
        raise fields.wrong("normalization_function", "rmsnorm")
    fields.require("mlp_bias", False, "granitemoehybrid")
    return (_read_layer(fields, sizes, has_shared_mlp=True),) * sizes.num_layers


def _read_hybrid_ropes(fields: ConfigFields) -> tuple[RopeConfig, ...]:
    match fields.raw.get("position_embedding_type"):
        case "rope":
            return one_rope(fields)
        case None | "nope":
            return (RopeConfig("none"),)
        case _:
            raise fields.wrong("position_embedding_type", "rope, nope")


def _with_width_of_mlp(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**raw, "intermediate_size": raw.get("shared_intermediate_size", 1024)}


GRANITE_HYBRID: Final = Family(
    "GraniteMoeHybridForCausalLM",
    "granitemoehybrid",
    keys=_FACTORS
    | {
        "attention_bias",
        "init_method",
        "layer_types",
        "layers_block_type",
        "mamba_chunk_size",
        "mamba_conv_bias",
        "mamba_d_conv",
        "mamba_d_head",
        "mamba_d_state",
        "mamba_expand",
        "mamba_n_groups",
        "mamba_n_heads",
        "mamba_proj_bias",
        "mlp_bias",
        "normalization_function",
        "num_experts_per_tok",
        "num_local_experts",
        "output_router_logits",
        "position_embedding_type",
        "router_aux_loss_coef",
        "shared_intermediate_size",
        "time_step_limit",
    },
    layers=_read_hybrid_layers,
    defaults={"num_local_experts": 8},
    ropes=_read_hybrid_ropes,
    ends=_read_ends,
    common=_with_width_of_mlp,
)
