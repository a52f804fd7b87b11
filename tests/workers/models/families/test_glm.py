"""GLM-4's keys and tensors."""

from __future__ import annotations

import pytest

from tensorweave.workers.models.assembly import tensor_shapes
from tests.workers.models.families.reading import QKV, biases, read


@pytest.mark.parametrize(("architecture", "num_norms"), [("GlmForCausalLM", 2), ("Glm4ForCausalLM", 4)])
def test_half_of_each_head_is_rotated_and_norms(architecture: str, num_norms: int) -> None:
    config = read(architecture)
    shapes = tensor_shapes(config)
    assert len([name for name in shapes if "layers.0" in name and "norm" in name]) == num_norms
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (192, 64)
    assert (biases(config), config.ropes[0].width(config.sizes.head_dim)) == (QKV, 64)
    assert biases(read(architecture, attention_bias=False)) == set()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"partial_rotary_factor is 0.3; supported: an even part of head_dim \(10\)"):
        read("Glm4ForCausalLM", head_dim=10, partial_rotary_factor=0.3)
