"""`RankProcesses`: the ranks of a gang whose resources are reserved, while Ray starts their processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.ranks import RankPlace

_CHECK_INTERVAL_S: Final = 2.0


class RankProcesses:
    """Used once. `nodes` has the node id and address reserved for each rank. `live_nodes` returns the ids of the nodes
    that are alive, and may block."""

    def __init__(self, nodes: Sequence[tuple[str, str]], live_nodes: Callable[[], Collection[str]]) -> None:
        self._nodes = nodes
        self._live_nodes = live_nodes
        self._up: set[int] = set()

    async def until_up(
        self, answers: Sequence[Awaitable[RankPlace]], check_interval_s: float = _CHECK_INTERVAL_S
    ) -> list[RankPlace]:
        """Return the first answer of every rank. Raises WorkerLost if one of their nodes is lost before that: Ray then
        looks for another node, without an error for the pending call."""
        answering = asyncio.create_task(self._all(answers))
        losing = asyncio.create_task(self._until_lost(check_interval_s))
        try:
            await asyncio.wait({answering, losing}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise WorkerLost(losing.result())
            return answering.result()
        finally:
            answering.cancel()
            losing.cancel()

    def phases(self) -> list[tuple[str, str]]:
        """Host and phase of each rank."""
        return [
            (host, "waiting for the others" if rank in self._up else "its process is being started by Ray")
            for rank, (_, host) in enumerate(self._nodes)
        ]

    async def _all(self, answers: Sequence[Awaitable[RankPlace]]) -> list[RankPlace]:
        return list(await asyncio.gather(*(self._note(*each) for each in enumerate(answers))))

    async def _note(self, rank: int, answer: Awaitable[RankPlace]) -> RankPlace:
        place = await answer
        self._up.add(rank)
        return place

    async def _until_lost(self, check_interval_s: float) -> str:
        while True:
            await asyncio.sleep(check_interval_s)
            alive = await asyncio.to_thread(self._live_nodes)
            lost = [
                f"rank {rank} on {host}" for rank, (node_id, host) in enumerate(self._nodes) if node_id not in alive
            ]
            if lost:
                return f"Ray has lost the host of {', '.join(lost)} before the process had started"
