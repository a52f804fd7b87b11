"""Qwen2-MoE and Qwen1.5-MoE: Qwen2's layers, with a mixture of experts and one more expert for all tokens."""

from __future__ import annotations

from typing import Final

from tensorweave.kernels.mixture.routing import Routing
from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.families.experts import (
    EXPERT_KEYS,
    SPARSE_KEYS,
    MixtureDesign,
    read_experts,
    read_num_chosen,
    read_sparse_layers,
)
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.llama import LlamaLayer
from tensorweave.workers.models.families.windows import WINDOW_KEYS, Windows, read_layer_types, read_window
from tensorweave.workers.models.mixture import ExpertNames
from tensorweave.workers.models.sizes import ExpertSizes, ModelSizes

QWEN_EXPERTS: Final = ExpertNames(
    router="mlp.gate",
    gate="mlp.experts.{}.gate_proj",
    up="mlp.experts.{}.up_proj",
    down="mlp.experts.{}.down_proj",
)
QWEN_KEYS: Final = WINDOW_KEYS | EXPERT_KEYS | SPARSE_KEYS | {"moe_intermediate_size", "norm_topk_prob"}
DEFAULT_WINDOW: Final = 4096


def read_qwen_routing(fields: ConfigFields, experts: ExpertSizes) -> Routing:
    return Routing(read_num_chosen(fields, experts), is_renormalized=fields.flag("norm_topk_prob"), is_rounded=True)


def _read_experts(fields: ConfigFields) -> ExpertSizes:
    return read_experts(fields, fields.count("moe_intermediate_size"), fields.count("shared_expert_intermediate_size"))


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[LlamaLayer, ...]:
    assert sizes.experts is not None
    has_qkv_bias = fields.raw.get("qkv_bias") is None or fields.flag("qkv_bias")
    mixture = MixtureDesign(
        QWEN_EXPERTS,
        sizes.experts,
        read_qwen_routing(fields, sizes.experts),
        shared=("mlp.shared_expert", "mlp.shared_expert_gate"),
    )
    return tuple(
        LlamaLayer(sizes.kv(window), has_qkv_bias, mixture=mixture if is_sparse else None)
        for window, is_sparse in zip(
            _read_windows(fields, sizes.num_layers), read_sparse_layers(fields, sizes.num_layers), strict=True
        )
    )


def _read_windows(fields: ConfigFields, num_layers: int) -> Windows:
    """With `use_sliding_window`, every other one of the first `max_window_layers`, unless `layer_types` says which."""
    window = read_window(fields, DEFAULT_WINDOW) if fields.flag("use_sliding_window") else None
    stop = fields.raw.get("max_window_layers", 28)
    return read_layer_types(fields, tuple(None if i % 2 or i >= stop else window for i in range(num_layers)), window)


QWEN2_MOE: Final = Family(
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    keys=QWEN_KEYS | {"qkv_bias", "shared_expert_intermediate_size"},
    layers=_read_layers,
    experts=_read_experts,
    default_kv_heads=16,
)
