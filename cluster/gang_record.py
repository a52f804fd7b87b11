"""`GangRecord`: what a restarted supervisor needs to resume a running gang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.protocol import GangAddress
from tensorweave.cluster.ranks import LinkRate, RankPlace


@dataclass(frozen=True, slots=True)
class GangRecord:
    """Stored by the gang's rank 0 once the gang is ready. It contains the gang's secrets."""

    pool: str
    slot: int
    spec: GangSpec
    address: GangAddress
    places: tuple[RankPlace, ...]
    node_ips: Mapping[str, str]
    link: LinkRate | None
