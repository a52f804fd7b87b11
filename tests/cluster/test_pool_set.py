"""Changes of a service's pools: by command, by a new configuration, and after a supervisor was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.gang_spec import GangSpec, explain_difference
from tensorweave.cluster.pool import GangPool
from tensorweave.cluster.pool_set import PoolSet
from tensorweave.cluster.pool_spec import PoolSpec
from tests.cluster.pool_bench import FakeGang, run_pools

_PREFILL = PoolSpec("prefill", GangSpec("prefill"), 2)
_DECODE = PoolSpec("decode", GangSpec("decode"), 2)


class _Service:
    """`refused` specs cannot start."""

    def __init__(self) -> None:
        self.refused: list[GangSpec] = []
        self.started: list[str] = []
        self._changed = asyncio.Event()
        self.pools = PoolSet(self._make, self._note_change)

    def _make(self, spec: PoolSpec) -> GangPool:
        def launch(gang: GangSpec, slot: int, epoch: int) -> FakeGang:
            self.started.append(f"{spec.name}-{slot}")
            error = ValueError("refused") if gang in self.refused else None
            made = FakeGang(f"{spec.name}-{slot}.{epoch}", epoch, error, gang)
            made.address = replace(made.address, role=gang.role)
            return made

        return GangPool(spec, launch, self._note_change)

    def _note_change(self) -> None:
        self._changed.set()

    def ids(self) -> list[str]:
        return sorted(address.gang_id for _, address in self.pools.ready)

    async def until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._changed.clear()
            await self._changed.wait()


def _with_pools(body: Callable[[_Service], Awaitable[None]]) -> None:
    async def run() -> None:
        service = _Service()
        service.pools.start([_PREFILL, _DECODE], {}, {})
        await service.until(lambda: len(service.ids()) == 4)
        await body(service)
        await service.pools.stop()

    run_pools(run)


def test_a_move_changes_both_pools_and_leaves_none_empty() -> None:
    async def body(service: _Service) -> None:
        assert await service.pools.move("prefill", "decode", None, 5.0, "by command") == "prefill-1.1"
        assert service.pools.sizes == {"prefill": 1, "decode": 3}
        roles = {address.gang_id: address.role for _, address in service.pools.ready}
        assert roles["prefill-1.1"] == "decode"
        for source, target, reason in (
            ("prefill", "decode", "would leave it without one"),
            ("prefill", "prefill", "already"),
            ("prefill", "embed", "no pool 'embed'; there are: prefill, decode"),
        ):
            with pytest.raises(ValueError, match=reason):
                await service.pools.move(source, target, None, 5.0)
        texts = [event["text"] for pool in service.pools.all for event in pool.describe()["events"]]
        assert "gang prefill-1.1 from prefill to decode: by command" in texts
        assert await service.pools.move("decode", "prefill", "prefill-1.1", 5.0) == "prefill-1.1"
        assert service.pools.sizes == {"prefill": 2, "decode": 2}

    _with_pools(body)


def test_gangs_that_differ_in_more_than_their_role_do_not_move() -> None:
    own = GangSpec("prefill", args={"max_batch_size": 4, "dtype": "float32"})
    other = GangSpec("decode", args={"max_batch_size": 8, "dtype": "float32"}, gpus_per_rank=1.0, hang_timeout_s=1.0)
    assert explain_difference(own, other) == "they differ in gpus_per_rank, max_batch_size"
    assert explain_difference(own, replace(own, role="decode", hang_timeout_s=1.0)) is None
    assert explain_difference(own, replace(own, role="embed")) == "one of them gives embeddings"


def test_an_update_replaces_the_gangs_of_all_pools_in_turn() -> None:
    async def body(service: _Service) -> None:
        service.started.clear()
        new = [replace(spec, gang=replace(spec.gang, model_digest="2")) for spec in (_PREFILL, _DECODE)]
        await service.pools.update(new, 5.0)
        assert service.started == ["prefill-2", "decode-2", "prefill-3", "decode-3"]
        assert service.ids() == ["decode-2.1", "decode-3.1", "prefill-2.1", "prefill-3.1"]
        service.started.clear()
        await service.pools.scale("decode", 3, 5.0)
        await service.pools.update(new, 5.0)
        assert service.started == ["decode-4"]
        assert service.pools.sizes["decode"] == 3, "an update that says nothing of the size leaves it"

    _with_pools(body)


def test_pools_that_come_are_ready_before_those_that_go_drain() -> None:
    async def body(service: _Service) -> None:
        main = PoolSpec("main", GangSpec("both"), 1)
        service.refused = [main.gang]
        await service.pools.update([main], 5.0)
        assert len(service.ids()) == 4, "pools stay if what is to replace them cannot start"
        service.refused = []
        await service.until(lambda: "main-0.2" in service.ids())
        await service.pools.update([main], 5.0)
        assert service.ids() == ["main-0.2"]
        assert service.pools.sizes == {"main": 1}

    _with_pools(body)


def test_a_successor_ends_gangs_of_an_old_spec_and_those_that_are_too_many() -> None:
    async def run() -> None:
        service = _Service()
        gangs = [
            FakeGang(f"prefill-{slot}.1", 1, None, GangSpec("prefill", args={"a": slot // 2})) for slot in range(4)
        ]
        running = {"prefill": {slot: (gang, gang.address) for slot, gang in enumerate(gangs)}}
        service.pools.start([replace(_PREFILL, gang=gangs[0].spec)], {"prefill": 3}, running)
        assert service.ids() == [gang.gang_id for gang in gangs]
        await service.pools.finish(5.0)
        assert len(service.ids()) == 3
        assert all(gang.spec == gangs[0].spec for gang, _ in service.pools.ready)
        assert service.ids()[:2] == ["prefill-0.1", "prefill-1.1"]
        await service.pools.stop()

    run_pools(run)


def test_no_gang_moves_during_an_update_and_an_update_waits_for_a_move() -> None:
    async def body(service: _Service) -> None:
        draining, is_empty = asyncio.Event(), asyncio.Event()

        async def quiesce(timeout_s: float) -> bool:
            draining.set()
            return await is_empty.wait()

        [gang] = [gang for gang, address in service.pools.ready if address.gang_id == "prefill-1.1"]
        gang.quiesce = quiesce  # type: ignore[method-assign]
        moving = asyncio.create_task(service.pools.move("prefill", "decode", None, 5.0))
        await draining.wait()
        new = [replace(spec, gang=replace(spec.gang, model_digest="2")) for spec in (_PREFILL, _DECODE)]
        updating = asyncio.create_task(service.pools.update(new, 5.0))
        with pytest.raises(NotReady, match="another move is under way"):
            await service.pools.move("decode", "prefill", None, 5.0)
        is_empty.set()
        assert await moving == "prefill-1.1"
        await updating
        assert all(gang.spec.model_digest == "2" for gang, _ in service.pools.ready)
        assert len(service.ids()) == 4

    _with_pools(body)
