"""Stacked experts under the names of one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorweave.workers.models.stacked_experts import StackedExperts

PREFIX = "model.layers.0.mlp.experts"
STORED = {
    f"{PREFIX}.gate_up_proj": torch.randn(3, 10, 12),
    f"{PREFIX}.gate_up_proj_bias": torch.randn(3, 12),
    f"{PREFIX}.down_proj": torch.randn(3, 6, 10),
    f"{PREFIX}.down_proj_bias": torch.randn(3, 10),
    "model.norm.weight": torch.randn(10),
}


class InMemory:
    shapes = {name: tuple(tensor.shape) for name, tensor in STORED.items()}
    dtypes = {name: "BF16" if name.endswith("bias") else "F32" for name in STORED}

    def read(self, name: str, *index: slice) -> Tensor:
        assert all(part.step is None for part in index), "files are read in whole runs"
        return STORED[name][index] if index else STORED[name]


def test_names_and_shapes() -> None:
    shapes = StackedExperts(InMemory()).shapes
    assert shapes["model.norm.weight"] == (10,)
    assert shapes[f"{PREFIX}.2.gate_proj.weight"] == shapes[f"{PREFIX}.2.up_proj.weight"] == (6, 10)
    assert shapes[f"{PREFIX}.0.down_proj.weight"] == (10, 6)
    assert shapes[f"{PREFIX}.0.up_proj.bias"] == (6,)
    assert shapes[f"{PREFIX}.0.down_proj.bias"] == (10,)
    assert len(shapes) == 1 + 3 * 6


def test_types_are_those_of_the_stored_tensors() -> None:
    source = StackedExperts(InMemory())
    assert source.dtypes.keys() == source.shapes.keys()
    assert source.dtypes["model.norm.weight"] == source.dtypes[f"{PREFIX}.1.up_proj.weight"] == "F32"
    assert source.dtypes[f"{PREFIX}.1.up_proj.bias"] == "BF16"


@pytest.mark.parametrize("number", [0, 2])
def test_gates_and_ups_alternate(number: int) -> None:
    source, name = StackedExperts(InMemory()), f"{PREFIX}.{number}"
    whole, bias = STORED[f"{PREFIX}.gate_up_proj"][number].T, STORED[f"{PREFIX}.gate_up_proj_bias"][number]
    for phase, part in enumerate(("gate_proj", "up_proj")):
        assert torch.equal(source.read(f"{name}.{part}.weight"), whole[phase::2])
        assert torch.equal(source.read(f"{name}.{part}.weight", slice(1, 4)), whole[phase::2][1:4])
        assert torch.equal(source.read(f"{name}.{part}.bias", slice(2, 6)), bias[phase::2][2:6])


def test_the_way_down() -> None:
    source, down = StackedExperts(InMemory()), STORED[f"{PREFIX}.down_proj"][1].T
    assert torch.equal(source.read(f"{PREFIX}.1.down_proj.weight", slice(0, 10), slice(2, 5)), down[:, 2:5])
    assert torch.equal(source.read(f"{PREFIX}.1.down_proj.bias"), STORED[f"{PREFIX}.down_proj_bias"][1])


def test_other_tensors_keep_their_names() -> None:
    source = StackedExperts(InMemory())
    assert torch.equal(source.read("model.norm.weight", slice(2, 4)), STORED["model.norm.weight"][2:4])
