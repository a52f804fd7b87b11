"""`PoolSet`: the pools of a service, and changes to them while it serves.

A change of a pool's gangs replaces them one after another (`GangPool.roll`), those of all pools in turn, so that pools
which exchange KV get new gangs at the same pace. Pools that are new start before those that they replace drain.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.gang_spec import explain_difference
from tensorweave.cluster.kv_links import ReadyGang
from tensorweave.cluster.pool import GangPool
from tensorweave.cluster.pool_spec import PoolSpec

logger = logging.getLogger(__name__)


class PoolSet:
    """Plain asyncio. `make` creates a pool without starting it; `on_change` is called after changes."""

    def __init__(self, make: Callable[[PoolSpec], GangPool], on_change: Callable[[], None]) -> None:
        self.all: list[GangPool] = []
        self._make = make
        self._on_change = on_change
        self._changing = asyncio.Lock()  # an update, or a move: a gang that moves has the spec that both pools have
        self._turn = asyncio.Lock()

    @property
    def ready(self) -> list[ReadyGang]:
        return [gang for pool in self.all for gang in pool.ready]

    @property
    def sizes(self) -> dict[str, int]:
        return {pool.spec.name: pool.size for pool in self.all}

    def start(
        self, specs: Sequence[PoolSpec], sizes: Mapping[str, int], running: Mapping[str, Mapping[int, ReadyGang]]
    ) -> None:
        """`running` are gangs of an earlier supervisor, by pool and slot."""
        self.all = [self._make(spec) for spec in specs]
        for pool in self.all:
            pool.replicas = sizes.get(pool.spec.name, pool.replicas)
            pool.start(running.get(pool.spec.name))

    async def scale(self, name: str, replicas: int, timeout_s: float, reason: str = "") -> None:
        """Raises ValueError."""
        pool = self._find(name)
        if replicas != pool.replicas:
            logger.warning("pool %s: %d to %d gangs%s", name, pool.replicas, replicas, f": {reason}" if reason else "")
        await pool.scale(replicas, timeout_s, reason)

    async def move(self, source: str, target: str, gang_id: str | None, timeout_s: float, reason: str = "") -> str:
        """Let a gang of one pool serve in another, without a restart, once its work has ended. Return its id.

        Raises:
            ValueError: There is no such pool or gang, their gangs differ in more than the role, or none would stay.
            NotReady: It still had requests after `timeout_s`; it serves on where it was. Or pools change already.
            WorkerLost: It was lost meanwhile.
        """
        if self._changing.locked():
            raise NotReady("an update or another move is under way; try again once it has ended", retry_after_s=5.0)
        async with self._changing:
            return await self._move(source, target, gang_id, timeout_s, reason)

    async def _move(self, source: str, target: str, gang_id: str | None, timeout_s: float, reason: str) -> str:
        giving, taking = self._find(source), self._find(target)
        if giving is taking:
            raise ValueError(f"a gang of pool {source} is in pool {source} already")
        if len(giving.ready) < 2:
            raise ValueError(f"pool {source} has {len(giving.ready)} ready gangs: a move would leave it without one")
        if difference := explain_difference(giving.spec.gang, taking.spec.gang):
            raise ValueError(f"gangs of pool {source} cannot serve in pool {target}: {difference}")
        text = f"from {source} to {target}" + (f": {reason}" if reason else "")
        logger.warning("moving a gang %s", text)
        gang = await giving.release(gang_id, timeout_s)
        await taking.adopt(gang)
        for pool in (giving, taking):
            pool.history.keep_event("moved", f"gang {gang.gang_id} {text}", gang.gang_id)
        return gang.gang_id

    async def update(self, specs: Sequence[PoolSpec], timeout_s: float) -> None:
        """Change to these pools; old gangs have `timeout_s` for their requests."""
        async with self._changing:
            old = {(pool.spec.name, pool.spec.gang.role): pool for pool in self.all}
            kept = [(pool, spec) for spec in specs if (pool := old.get((spec.name, spec.gang.role))) is not None]
            pools = {pool.spec.name: pool for pool, _ in kept}
            added = [self._make(spec) for spec in specs if spec.name not in pools]
            ending = [pool for pool in self.all if pool not in pools.values()]
            pools |= {pool.spec.name: pool for pool in added}
            self.all = [*(pools[spec.name] for spec in specs), *ending]
            for pool in added:
                pool.start()
            self._on_change()
            logger.info("ending pools: %s", ", ".join(pool.spec.name for pool in ending) or "none")
            changes = [pool.roll(spec, timeout_s, self._turn) for pool, spec in kept if pool.spec != spec]
            await asyncio.gather(*changes, self._replace(added, ending, timeout_s))

    async def _replace(self, added: Sequence[GangPool], ending: Sequence[GangPool], timeout_s: float) -> None:
        """End pools once those that come in their place are ready, or lack only the room."""
        refusals = await asyncio.gather(*(pool.until_served() for pool in added)) if ending else []
        if refusal := next(filter(None, refusals), None):
            logger.warning("pools %s stay: %s", ", ".join(pool.spec.name for pool in ending), refusal)
            return
        await self._drain_in_order(ending, timeout_s)
        self.all = [pool for pool in self.all if pool not in ending]
        self._on_change()

    async def finish(self, timeout_s: float) -> None:
        """Go on with what an earlier supervisor was doing: gangs of an old spec, and those that are too many."""
        async with self._changing:
            await asyncio.gather(*(pool.roll(pool.spec, timeout_s, self._turn) for pool in self.all if pool.is_behind))

    async def drain(self, timeout_s: float) -> None:
        """End all pools; `timeout_s` is the limit for all of it."""
        await self._drain_in_order(self.all, timeout_s)

    async def _drain_in_order(self, pools: Sequence[GangPool], timeout_s: float) -> None:
        """Prefill pools last, since the others fetch KV from them."""
        end_s = time.monotonic() + timeout_s
        fetching = [pool for pool in pools if pool.spec.gang.role != "prefill"]
        prefilling = [pool for pool in pools if pool.spec.gang.role == "prefill"]
        for some in (fetching, prefilling):
            left_s = max(0.0, end_s - time.monotonic())
            await asyncio.gather(*(pool.drain(left_s) for pool in some))

    async def stop(self) -> None:
        await asyncio.gather(*(pool.stop() for pool in self.all))

    def _find(self, name: str) -> GangPool:
        pools = {pool.spec.name: pool for pool in self.all}
        if name not in pools:
            raise ValueError(f"there is no pool {name!r}; there are: {', '.join(pools)}")
        return pools[name]
