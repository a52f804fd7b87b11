"""`GangSpec`: what every gang of a pool consists of. The deploy room and the LLM class create it, `cluster.gang` reads
it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final

from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.placement_rule import PlacementRule
from tensorweave.cluster.protocol import Role
from tensorweave.cluster.tls import TlsFiles

_MAY_DIFFER: Final = ("role", "args", "place_timeout_s", "start_timeout_s", "hang_timeout_s")
"""Of two pools, between which gangs move: `args` are compared one by one."""


@dataclass(frozen=True)
class GangSpec:
    """`args` are `TorchLlmArgs` fields, `worker_options` are passed to the worker class. `model_digest` is that of the
    model that each rank must find on its host. KV goes through `transfer_network` (`cluster.host_networks`). With `tls`
    a gang may span hosts only if `allow_plain_gangs`: what its ranks send each other is not encrypted. Without a
    `place_timeout_s`, `cluster.placement` chooses one."""

    role: Role = "both"
    mesh: Mesh = field(default_factory=Mesh)
    args: dict[str, Any] = field(default_factory=dict)
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0
    runtime_env: dict[str, Any] | None = None
    worker_options: dict[str, Any] = field(default_factory=dict)
    place_timeout_s: float | None = None
    start_timeout_s: float = 600.0
    hang_timeout_s: float = 8.0
    model_digest: str | None = None
    transfer_network: str | None = None
    tls: TlsFiles | None = None
    allow_plain_gangs: bool = False
    placement: PlacementRule = field(default_factory=PlacementRule)

    @property
    def bundle(self) -> dict[str, float]:
        """One rank's resources."""
        return {
            name: amount for name, amount in (("CPU", self.cpus_per_rank), ("GPU", self.gpus_per_rank)) if amount > 0
        } or {"CPU": 0.001}


def explain_difference(own: GangSpec, other: GangSpec) -> str | None:
    """Why a gang of one spec cannot serve as one of the other without a restart; None if it can."""
    if "embed" in (own.role, other.role) and own.role != other.role:
        return "one of them gives embeddings"
    names = [each.name for each in fields(GangSpec) if each.name not in _MAY_DIFFER]
    different = [name for name in names if getattr(own, name) != getattr(other, name)]
    different += sorted(key for key in own.args.keys() | other.args.keys() if own.args.get(key) != other.args.get(key))
    return f"they differ in {', '.join(different)}" if different else None
