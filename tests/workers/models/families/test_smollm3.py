"""SmolLM3's layers without rotation."""

from __future__ import annotations

from typing import Any

import pytest

from tests.workers.models.families.reading import read


def kinds(**fields: Any) -> list[str]:
    config = read("SmolLM3ForCausalLM", **fields)
    return [config.ropes[layer.kv.rope].kind for layer in config.layers]


def test_every_fourth_layer_is_not_rotated() -> None:
    config = read("SmolLM3ForCausalLM")
    assert kinds() == ["default"] * 3 + ["none"]
    assert (config.ropes[0].theta, config.has_tied_embeddings) == (2e6, True)
    assert kinds(no_rope_layer_interval=2) == ["default", "none"] * 2
    assert kinds(no_rope_layers=[0, 1, 1, 0], rope_theta=5e6) == ["none", "default", "default", "none"]


def test_layers_without_rotation_have_the_windows() -> None:
    assert read("SmolLM3ForCausalLM", use_sliding_window=True, sliding_window=7).windows == (None, None, None, 7)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"no_rope_layers is \[1\]; supported: a 1 or a 0 for each of 4 layers"):
        kinds(no_rope_layers=[1])
    with pytest.raises(ValueError, match=r"partial_rotary_factor is 0\.5; supported: 1\.0 for this architecture"):
        kinds(partial_rotary_factor=0.5)
