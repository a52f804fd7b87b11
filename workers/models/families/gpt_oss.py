"""gpt-oss: a sink per head, windows in every other layer; experts with biases and an activation that is clamped.

Its experts are stacked (`workers.models.stacked_experts`), in the checkpoints of OpenAI as MXFP4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tensorweave.kernels.mixture.reference import Swiglu
from tensorweave.kernels.mixture.routing import Routing
from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.families.experts import EXPERT_KEYS, MixtureDesign, read_experts, read_num_chosen
from tensorweave.workers.models.families.family import Family, one_rope
from tensorweave.workers.models.families.llama import LlamaLayer
from tensorweave.workers.models.families.windows import read_layer_types, read_window
from tensorweave.workers.models.mixture import ExpertNames
from tensorweave.workers.models.rope_config import RopeConfig
from tensorweave.workers.models.sizes import ExpertSizes, ModelSizes

_NAMES: Final = ExpertNames(
    router="mlp.router",
    gate="mlp.experts.{}.gate_proj",
    up="mlp.experts.{}.up_proj",
    down="mlp.experts.{}.down_proj",
)
_THETA: Final = 150_000.0
_DTYPE: Final = {"dtype": "bfloat16"}
_ROPE: Final = {
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
}


def _common(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI's files name no type; what is not MXFP4 there is bfloat16. The class has a rotation of its own."""
    has_dtype = raw.get("dtype") is not None or raw.get("torch_dtype") is not None
    has_rope = raw.get("rope_scaling") is not None or raw.get("rope_parameters") is not None
    return {**({} if has_dtype else _DTYPE), **({} if has_rope else _ROPE), **raw}


def _read_experts(fields: ConfigFields) -> ExpertSizes:
    return read_experts(fields, fields.count("intermediate_size"))


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[LlamaLayer, ...]:
    assert sizes.experts is not None
    num_chosen = read_num_chosen(fields, sizes.experts)
    if fields.raw.get("experts_per_token") not in (None, num_chosen):
        raise fields.wrong("experts_per_token", f"the same as num_experts_per_tok ({num_chosen})")
    window = read_window(fields, 128)
    implied = tuple(None if i % 2 else window for i in range(sizes.num_layers))
    routing = Routing(num_chosen, is_renormalized=True, is_rounded=True)
    swiglu = Swiglu(fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0), shift=1.0)
    mixture = MixtureDesign(_NAMES, sizes.experts, routing, swiglu, has_bias=True)
    has_bias = fields.flag("attention_bias")
    return tuple(
        LlamaLayer(sizes.kv(own), has_bias, has_bias, has_sinks=True, mixture=mixture)
        for own in read_layer_types(fields, implied, window)
    )


def _read_ropes(fields: ConfigFields) -> tuple[RopeConfig, ...]:
    return one_rope(fields, theta=_THETA)


GPT_OSS: Final = Family(
    "GptOssForCausalLM",
    "gpt_oss",
    keys=EXPERT_KEYS
    | {
        "attention_bias",
        "experts_per_token",
        "initial_context_length",  # which rope_scaling says as well
        "layer_types",
        "sliding_window",
        "swiglu_alpha",
        "swiglu_limit",
    },
    layers=_read_layers,
    experts=_read_experts,
    default_kv_heads=8,
    default_head_dim=64,
    defaults={"attention_bias": True, "rms_norm_eps": 1e-5},
    ropes=_read_ropes,
    common=_common,
    has_stacked_experts=True,
)
