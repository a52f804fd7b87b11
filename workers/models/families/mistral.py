"""Mistral: Llama's layers without biases, and with one sliding window in every layer where `sliding_window` says so."""

from __future__ import annotations

from typing import Final

from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.llama import LlamaLayer
from tensorweave.workers.models.families.windows import WINDOW_KEYS, read_layer_types, read_window
from tensorweave.workers.models.sizes import ModelSizes

_DEFAULT_WINDOW: Final = 4096


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[LlamaLayer, ...]:
    fields.require("attention_bias", False, "mistral")
    fields.require("mlp_bias", False, "mistral")
    if fields.raw.get("sliding_window") and fields.raw.get("use_sliding_window") is False:
        raise fields.wrong("use_sliding_window", "true where sliding_window is given, for Mistral")
    window = read_window(fields, _DEFAULT_WINDOW)
    windows = (window,) * sizes.num_layers
    if read_layer_types(fields, windows, window) != windows:
        raise fields.wrong("layer_types", "the same kind in every layer for Mistral, as sliding_window says")
    return (LlamaLayer(sizes.kv(window)),) * sizes.num_layers


MISTRAL: Final = Family(
    "MistralForCausalLM",
    "mistral",
    keys=WINDOW_KEYS | {"attention_bias", "mlp_bias"},
    layers=_read_layers,
    default_kv_heads=8,
)
