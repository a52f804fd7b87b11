"""What a supervisor publishes, and how one that outlives its creator is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tensorweave.cluster.adapter import Adapter
from tensorweave.cluster.kv_links import Pair
from tensorweave.cluster.pool_spec import PoolState
from tensorweave.cluster.protocol import LinkMeasurement


@dataclass(frozen=True, slots=True)
class DetachedSpec:
    """The name and namespace of a supervisor that outlives its creator, and the resources that its node must have."""

    name: str
    namespace: str
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServiceState:
    """All pools at one moment. `version` differs from that of every other moment, including those before a restart.
    `links` has the measured link per decode gang and prefill gang; `adapters` are those that clients may name."""

    version: int
    pools: tuple[PoolState, ...]
    links: Mapping[Pair, LinkMeasurement] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()

    def usable_links(self) -> dict[str, dict[str, LinkMeasurement]]:
        """The links by decode gang, then by prefill gang, without those that nothing can be sent over."""
        usable: dict[str, dict[str, LinkMeasurement]] = {}
        for (decode, prefill), link in self.links.items():
            if link.error is None:
                usable.setdefault(decode, {})[prefill] = link
        return usable
