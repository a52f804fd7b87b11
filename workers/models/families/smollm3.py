"""SmolLM3: Llama's layers, some of which (every fourth) do not rotate queries and keys."""

from __future__ import annotations

from typing import Final

from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.families.family import Family, one_rope
from tensorweave.workers.models.families.llama import LlamaLayer
from tensorweave.workers.models.families.windows import WINDOW_KEYS, read_layer_types, read_window
from tensorweave.workers.models.rope_config import RopeConfig
from tensorweave.workers.models.sizes import ModelSizes


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[LlamaLayer, ...]:
    bias = fields.flag("attention_bias")
    rotated = _read_rotated(fields, sizes.num_layers)
    window = read_window(fields, None) if fields.flag("use_sliding_window") else None
    windows = read_layer_types(fields, tuple(None if turns else window for turns in rotated), window)
    return tuple(
        LlamaLayer(sizes.kv(own_window, 0 if turns else 1), bias, bias, fields.flag("mlp_bias"))
        for own_window, turns in zip(windows, rotated, strict=True)
    )


def _read_rotated(fields: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    """`no_rope_layers` has a 1 for each layer that is rotated, despite its name."""
    flags = fields.raw.get("no_rope_layers")
    if flags is None:
        interval = fields.count("no_rope_layer_interval")
        return tuple((i + 1) % interval != 0 for i in range(num_layers))
    if not isinstance(flags, list) or len(flags) < num_layers or set(flags) - {0, 1}:
        raise fields.wrong("no_rope_layers", f"a 1 or a 0 for each of {num_layers} layers")
    return tuple(bool(flag) for flag in flags[:num_layers])


def _read_ropes(fields: ConfigFields) -> tuple[RopeConfig, ...]:
    return (*one_rope(fields, theta=2_000_000.0), RopeConfig("none"))


SMOLLM3: Final = Family(
    "SmolLM3ForCausalLM",
    "smollm3",
    keys=WINDOW_KEYS | {"attention_bias", "mlp_bias", "no_rope_layer_interval", "no_rope_layers"},
    layers=_read_layers,
    default_kv_heads=4,
    defaults={"no_rope_layer_interval": 4, "tie_word_embeddings": True},
    ropes=_read_ropes,
)
