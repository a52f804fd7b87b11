"""Qwen3 (dense): an RMSNorm over each query and key head before it is rotated; `attention_bias` as Llama's."""

from __future__ import annotations

from typing import Final

from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.llama import LlamaLayer
from tensorweave.workers.models.families.windows import WINDOW_KEYS, read_late_windows
from tensorweave.workers.models.sizes import ModelSizes

_DEFAULT_WINDOW: Final = 4096


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[LlamaLayer, ...]:
    fields.require("mlp_bias", False, "qwen3")
    has_bias = fields.flag("attention_bias")
    windows = read_late_windows(fields, sizes.num_layers, _DEFAULT_WINDOW)
    return tuple(LlamaLayer(sizes.kv(window), has_bias, has_bias, has_head_norms=True) for window in windows)


QWEN3: Final = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    keys=WINDOW_KEYS | {"attention_bias", "mlp_bias"},
    layers=_read_layers,
    default_kv_heads=32,
    default_head_dim=128,
)
