"""Qwen3-MoE: Qwen3's layers, most of them with a mixture of experts."""

from __future__ import annotations

from typing import Final

from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.families.experts import MixtureDesign, read_experts, read_sparse_layers
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.llama import LlamaLayer
from tensorweave.workers.models.families.qwen2_moe import DEFAULT_WINDOW, QWEN_EXPERTS, QWEN_KEYS, read_qwen_routing
from tensorweave.workers.models.families.windows import read_layer_types, read_window
from tensorweave.workers.models.sizes import ExpertSizes, ModelSizes


def _read_experts(fields: ConfigFields) -> ExpertSizes:
    return read_experts(fields, fields.count("moe_intermediate_size"))


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[LlamaLayer, ...]:
    """With `use_sliding_window`, transformers' class gives every layer the window, whatever the other keys say."""
    assert sizes.experts is not None
    window = read_window(fields, DEFAULT_WINDOW) if fields.flag("use_sliding_window") else None
    windows = (window,) * sizes.num_layers
    if read_layer_types(fields, windows, window) != windows:
        raise fields.wrong("layer_types", "the same kind in every layer for Qwen3-MoE, as use_sliding_window says")
    mixture = MixtureDesign(QWEN_EXPERTS, sizes.experts, read_qwen_routing(fields, sizes.experts))
    kv, has_bias = sizes.kv(window), fields.flag("attention_bias")
    return tuple(
        LlamaLayer(kv, has_bias, has_bias, has_head_norms=True, mixture=mixture if is_sparse else None)
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
