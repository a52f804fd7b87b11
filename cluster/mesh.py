"""`Mesh` says how the ranks of a gang divide a model, `MeshRank` where one rank stands in it.

The axes are those of the field: `tensor` ranks share each layer, `pipeline` ranks hold successive layers, `data` ranks
hold the same layers and other requests. `expert` divides the tensor axis: in a mixture of experts, `expert` groups of
`tensor / expert` ranks (`moe_tensor`) hold different experts, so that it adds no ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes of the axes. Ranks are numbered along the tensor axis first, then along pipeline, then along data."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1

    def __post_init__(self) -> None:
        if min(self.tensor, self.pipeline, self.expert, self.data) < 1:
            raise ValueError(f"{self}: every axis has at least one rank")
        if self.tensor % self.expert:
            raise ValueError(f"{self}: expert must divide tensor")

    @property
    def size(self) -> int:
        """All ranks of the gang."""
        return self.tensor * self.pipeline * self.data

    @property
    def moe_tensor(self) -> int:
        """The ranks that share one expert."""
        return self.tensor // self.expert

    def ranks(self) -> tuple[MeshRank, ...]:
        return tuple(MeshRank(rank, self) for rank in range(self.size))


@dataclass(frozen=True, slots=True)
class MeshRank:
    """Rank `rank` of a gang, and its coordinate on each axis of `mesh`."""

    rank: int = 0
    mesh: Mesh = Mesh()

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.mesh.size, f"rank {self.rank} of {self.mesh}"

    @property
    def tensor(self) -> int:
        return self.rank % self.mesh.tensor

    @property
    def pipeline(self) -> int:
        return self.rank // self.mesh.tensor % self.mesh.pipeline

    @property
    def expert(self) -> int:
        return self.tensor % self.mesh.expert

    @property
    def moe_tensor(self) -> int:
        """Its number among the ranks that share its experts."""
        return self.tensor // self.mesh.expert

    @property
    def data(self) -> int:
        return self.rank // (self.mesh.tensor * self.mesh.pipeline)

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline == self.mesh.pipeline - 1

    def in_stage(self, stage: int) -> MeshRank:
        """The rank at the same place on the other axes in another stage."""
        return replace(self, rank=self.rank + (stage - self.pipeline) * self.mesh.tensor)

    @property
    def stage_ranks(self) -> tuple[int, ...]:
        """The ranks that share this rank's layers: its tensor-parallel group."""
        first = self.rank - self.tensor
        return tuple(range(first, first + self.mesh.tensor))
