"""Gemma 2 and 3 (text): embeddings times the root of their size, norms before and behind attention and MLP with weights
that count from 1, gates through gelu, a scale of scores of their own, and windows in some layers.

Gemma 2 has soft caps of scores and logits, Gemma 3 norms of heads, and a rotation of its own for windows. Of
checkpoints with a vision tower, the text model is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from tensorweave.workers.models.config import ModelEnds
from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.decoder_layer import DecoderLayer
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.layer_kinds import read_kinds, ropes_of_kinds
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.rope_config import RopeConfig, RopeDefaults
from tensorweave.workers.models.sizes import LayerKv, ModelSizes

_GELU: Final = "gelu_pytorch_tanh"
_KEYS: Final = frozenset(
    {
        "attention_bias",
        "attn_logit_softcapping",
        "cache_implementation",
        "final_logit_softcapping",
        "hidden_activation",
        "layer_types",
        "query_pre_attn_scalar",
        "sliding_window",
        "sliding_window_size",
    }
)
_DEFAULTS: Final[Mapping[str, Any]] = {
    "hidden_act": _GELU,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class GemmaLayer:
    kv: LayerKv
    scale: float
    soft_cap: float | None
    has_head_norms: bool
    has_attention_bias: bool

    def build(self, layer: LayerBuilder) -> DecoderLayer:
        return DecoderLayer(
            attention_norm=layer.norm("input_layernorm"),
            attention=layer.attention(
                "self_attn",
                self.kv,
                has_qkv_bias=self.has_attention_bias,
                has_output_bias=self.has_attention_bias,
                norms=layer.head_norms("self_attn") if self.has_head_norms else None,
                scale=self.scale,
                soft_cap=self.soft_cap,
            ),
            after_attention=layer.norm("post_attention_layernorm"),
            mlp_norm=layer.norm("pre_feedforward_layernorm"),
            mlp=layer.gated_mlp("mlp", has_gelu=True),
            after_mlp=layer.norm("post_feedforward_layernorm"),
        )


def _read_gemma2(fields: ConfigFields, sizes: ModelSizes) -> tuple[GemmaLayer, ...]:
    soft_cap = fields.optional_number("attn_logit_softcapping")
    kinds = read_kinds(fields, sizes, full_every=2, has_own_ropes=False)
    return tuple(_read_layer(fields, kv, soft_cap, has_head_norms=False) for kv in kinds)


def _read_gemma3(fields: ConfigFields, sizes: ModelSizes) -> tuple[GemmaLayer, ...]:
    if fields.raw.get("attn_logit_softcapping") is not None:
        raise fields.wrong("attn_logit_softcapping", "null for Gemma 3, whose class in transformers does not read it")
    kinds = read_kinds(fields, sizes, full_every=fields.count("sliding_window_pattern"))
    return tuple(_read_layer(fields, kv, None, has_head_norms=True) for kv in kinds)


def _read_layer(fields: ConfigFields, kv: LayerKv, soft_cap: float | None, *, has_head_norms: bool) -> GemmaLayer:
    if fields.raw.get("hidden_activation", _GELU) != _GELU:
        raise fields.wrong("hidden_activation", _GELU)
    if fields.raw.get("sliding_window_size") not in (None, fields.raw["sliding_window"]):
        raise fields.wrong("sliding_window_size", "the same as sliding_window, which counts")
    scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
    return GemmaLayer(kv, scale, soft_cap, has_head_norms, fields.flag("attention_bias"))


def _read_ends(fields: ConfigFields, sizes: ModelSizes) -> ModelEnds:
    return ModelEnds(sizes.hidden_size**0.5, logit_cap=fields.optional_number("final_logit_softcapping"))


def _read_ropes(fields: ConfigFields) -> tuple[RopeConfig, ...]:
    return ropes_of_kinds(fields, RopeDefaults(1_000_000.0), RopeDefaults(theta_key="rope_local_base_freq"))


GEMMA2: Final = Family(
    "Gemma2ForCausalLM",
    "gemma2",
    keys=_KEYS,
    layers=_read_gemma2,
    defaults={
        **_DEFAULTS,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    ends=_read_ends,
    norm_offset=1.0,
    activations=frozenset({_GELU}),
)
GEMMA3: Final = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    keys=_KEYS | {"rope_local_base_freq", "sliding_window_pattern"},
    layers=_read_gemma3,
    defaults={
        **_DEFAULTS,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
    },
    ropes=_read_ropes,
    ends=_read_ends,
    norm_offset=1.0,
    activations=frozenset({_GELU}),
)

_OF_IMAGES: Final = frozenset(
    {
        "boi_token_index",
        "eoi_token_index",
        "image_token_id",
        "image_token_index",
        "mm_tokens_per_image",
        "vision_config",
    }
)


def _text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """What stands outside, as the ends of sequence, counts for the text model too."""
    text = raw.get("text_config")
    outside = {key: value for key, value in raw.items() if key not in _OF_IMAGES | {"text_config"}}
    return {**(text if isinstance(text, Mapping) else {}), **outside}


GEMMA3_WITH_VISION: Final = replace(
    GEMMA3,
    architecture="Gemma3ForConditionalGeneration",
    model_type="gemma3",
    common=_text_part,
    nested_names={
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
    },
)
