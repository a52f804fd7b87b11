"""How ranks are numbered along the axes of a mesh."""

from __future__ import annotations

import pytest

from tensorweave.cluster.mesh import Mesh, MeshRank


def test_one_rank_alone() -> None:
    place = MeshRank()
    assert (place.mesh.size, place.tensor, place.pipeline, place.expert, place.data) == (1, 0, 0, 0, 0)


def test_the_tensor_axis_varies_fastest() -> None:
    places = Mesh(tensor=2, pipeline=2, data=2).ranks()
    assert [(place.data, place.pipeline, place.tensor) for place in places] == [
        (data, pipeline, tensor) for data in range(2) for pipeline in range(2) for tensor in range(2)
    ]


def test_experts_divide_the_tensor_axis() -> None:
    mesh = Mesh(tensor=4, expert=2)
    assert mesh.size == 4
    assert [place.expert for place in mesh.ranks()] == [0, 1, 0, 1]
    assert [place.moe_tensor for place in mesh.ranks()] == [0, 0, 1, 1]
    assert mesh.moe_tensor == 2
    with pytest.raises(ValueError, match="expert must divide tensor"):
        Mesh(tensor=4, expert=3)


def test_the_ranks_of_a_stage_share_its_layers() -> None:
    places = Mesh(tensor=2, pipeline=3, data=2).ranks()
    assert [place.stage_ranks for place in places[::2]] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    assert [place.rank for place in places if place.is_first_stage] == [0, 1, 6, 7]
    assert [place.rank for place in places if place.is_last_stage] == [4, 5, 10, 11]
    assert [places[9].in_stage(stage).rank for stage in range(3)] == [7, 9, 11]


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "expert", "data"])
def test_an_axis_without_ranks_is_refused(axis: str) -> None:
    with pytest.raises(ValueError, match=f"{axis}=0.*at least one rank"):
        Mesh(**{axis: 0})
