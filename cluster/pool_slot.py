"""`PoolSlot`: one place of a pool, and the gangs that it has, one after another."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, Literal

from tensorweave.cluster.fault_record import FaultRecord
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.pool_gang import PoolGang
from tensorweave.cluster.pool_spec import GangState
from tensorweave.cluster.protocol import GangAddress

StartProblem = Literal["unplaced", "refused", "lost"]
"""Why the latest start failed: no room on the cluster, arguments or files that are wrong, or a lost rank."""

_MIN_FAILED_PAUSE_S: Final = 5.0


@dataclass(slots=True, eq=False)
class PoolSlot:
    """`failure` is why no gang will be ready soon; `trouble` is the last problem. One that `is_ending` gets no other
    gang, and does not count among the pool's replicas; one that `is_released` has given its gang away."""

    number: int
    spec: GangSpec
    record: FaultRecord
    epoch: int = 0
    state: GangState = "starting"
    gang: PoolGang | None = None
    address: GangAddress | None = None
    task: asyncio.Task[None] | None = None
    is_ending: bool = False
    is_released: bool = False
    problem: StartProblem | None = None
    failure: str | None = None
    trouble: str | None = None

    @property
    def gang_id(self) -> str:
        """The id of the gang that it has or had last."""
        return "" if self.gang is None else self.gang.gang_id

    @property
    def pause_s(self) -> float:
        return max(self.record.pause_s, 0.0 if self.failure is None else _MIN_FAILED_PAUSE_S)
