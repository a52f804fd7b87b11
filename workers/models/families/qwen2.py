"""Qwen2 and Qwen2.5: Llama's layers with biases on q, k and v alone, and optional windows in the later layers."""

from __future__ import annotations

from typing import Final

from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.llama import LlamaLayer
from tensorweave.workers.models.families.windows import WINDOW_KEYS, read_late_windows
from tensorweave.workers.models.sizes import ModelSizes

_DEFAULT_WINDOW: Final = 4096


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[LlamaLayer, ...]:
    fields.require("attention_bias", True, "qwen2")
    fields.require("mlp_bias", False, "qwen2")
    windows = read_late_windows(fields, sizes.num_layers, _DEFAULT_WINDOW)
    return tuple(LlamaLayer(sizes.kv(window), has_qkv_bias=True) for window in windows)


QWEN2: Final = Family(
    "Qwen2ForCausalLM",
    "qwen2",
    keys=WINDOW_KEYS | {"attention_bias", "mlp_bias"},
    layers=_read_layers,
    default_kv_heads=32,
)
