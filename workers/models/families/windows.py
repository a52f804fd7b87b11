"""Sliding windows as config.json states them: one size, and which layers have it."""

from __future__ import annotations

from typing import Final

from tensorweave.workers.models.config_fields import ConfigFields

WINDOW_KEYS: Final = frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"})

Windows = tuple[int | None, ...]


def read_window(fields: ConfigFields, default: int | None) -> int | None:
    window = fields.raw.get("sliding_window", default)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise fields.wrong("sliding_window", "a whole number of at least 1, or null")
    return window


def read_late_windows(fields: ConfigFields, num_layers: int, default_window: int) -> Windows:
    """As Qwen's configurations: with `use_sliding_window`, the layers from `max_window_layers` on have the window,
    unless `layer_types` says which."""
    window = read_window(fields, default_window) if fields.flag("use_sliding_window") else None
    first = fields.raw.get("max_window_layers", 28)
    return read_layer_types(fields, tuple(window if i >= first else None for i in range(num_layers)), window)


def read_layer_types(fields: ConfigFields, implied: Windows, window: int | None) -> Windows:
    """The windows that `layer_types` states, or the `implied` ones where it is not there."""
    types = fields.raw.get("layer_types")
    if types is None:
        return implied
    if not isinstance(types, list) or len(types) != len(implied):
        raise fields.wrong("layer_types", f"one entry for each of {len(implied)} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and window is None):
            raise fields.wrong("layer_types", "full_attention, and sliding_attention where sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
