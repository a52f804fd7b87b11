"""Where the ranks of a gang are."""

from __future__ import annotations

from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.rank_places import RankPlaces
from tensorweave.cluster.ranks import RankPlace


def places_on(*nodes: str) -> RankPlaces:
    return RankPlaces([RankPlace(node, 100 + number, 0.0) for number, node in enumerate(nodes)])


def test_stages_whose_ranks_are_on_several_hosts_are_told() -> None:
    mesh = Mesh(tensor=2, pipeline=2)
    assert places_on("a", "a", "b", "b").scattered_stages(mesh) == []
    assert places_on("a", "a", "a", "b").scattered_stages(mesh) == [1]
    assert places_on("a", "b", "a", "b").scattered_stages(mesh) == [0, 1]
    assert places_on("a", "b", "c", "d").scattered_stages(Mesh(tensor=4)) == []
