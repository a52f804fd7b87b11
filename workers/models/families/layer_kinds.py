"""Models whose layers are of two kinds: some attend to all positions, some to a window, each with its own rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.families.windows import read_layer_types, read_window
from tensorweave.workers.models.rope_config import RopeConfig, RopeDefaults
from tensorweave.workers.models.sizes import LayerKv, ModelSizes

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"


def read_kinds(
    fields: ConfigFields, sizes: ModelSizes, *, full_every: int, has_own_ropes: bool = True
) -> tuple[LayerKv, ...]:
    """Windows in all layers but every `full_every`-th, unless `layer_types` says which. With `has_own_ropes`, windows
    have the second of the model's rotations."""
    window = read_window(fields, None)
    if window is None:
        raise fields.wrong("sliding_window", "a whole number of at least 1")
    implied = tuple(None if (i + 1) % full_every == 0 else window for i in range(sizes.num_layers))
    windows = read_layer_types(fields, implied, window)
    return tuple(sizes.kv(each, 1 if has_own_ropes and each is not None else 0) for each in windows)


def ropes_of_kinds(fields: ConfigFields, full: RopeDefaults, sliding: RopeDefaults) -> tuple[RopeConfig, RopeConfig]:
    """The rotations of full layers and of layers with windows. `rope_scaling`, in the old spelling, is that of full
    layers alone."""
    parameters = fields.raw.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or set(parameters) - {FULL, SLIDING}:
        raise fields.wrong("rope_parameters", f"an object for each of {FULL}, {SLIDING}")
    max_len, raw = fields.count("max_position_embeddings"), fields.raw
    without = {key: value for key, value in raw.items() if key != "rope_scaling"}
    of_full = RopeConfig.from_hf(raw, max_len, fields.source, full, FULL)
    of_sliding = RopeConfig.from_hf(without, max_len, fields.source, sliding, SLIDING)
    if of_full.part != 1 or of_sliding.part != 1:
        raise fields.wrong("partial_rotary_factor", "1.0 for this architecture")
    return of_full, of_sliding
