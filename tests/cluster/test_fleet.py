"""A fleet follows its supervisor: links come and go with the gangs, and outlive a supervisor that does not answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, cast

import pytest
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError

from tensorweave.cluster import fleet as fleet_module
from tensorweave.cluster import socket_link
from tensorweave.cluster.errors import NotReady, WorkerLost
from tensorweave.cluster.fleet import StaticFleet, WatchedFleet
from tensorweave.cluster.kv_links import Pair
from tensorweave.cluster.pool_spec import PoolState
from tensorweave.cluster.protocol import GangAddress, GenerateRequest, LinkMeasurement, Role, SamplingSpec
from tensorweave.cluster.service_state import ServiceState
from tensorweave.cluster.socket_link import SocketLink
from tensorweave.cluster.supervisor import PoolSupervisor
from tensorweave.workers.fakes.fake_executor import FAKE_INFO, FakeExecutor, fake_output
from tensorweave.workers.leader.server import LeaderServer

_PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader's thread or an answer that is late for some seconds is neither lost nor away."""
    monkeypatch.setattr(socket_link, "SILENCE_LIMIT_S", _PATIENCE_S)
    monkeypatch.setattr(fleet_module, "_DESCRIBE_TIMEOUT_S", _PATIENCE_S)


class _Method:
    """`handle.method.remote(...)`, as Ray spells it."""

    def __init__(self, remote: Callable[..., Awaitable[Any]]) -> None:
        self.remote = remote


class _FakeSupervisor:
    """Answers `watch` with what it was last told to publish; fails while `is_down`."""

    def __init__(self) -> None:
        self.is_down = False
        self.num_calls = 0
        self.links: dict[Pair, LinkMeasurement] = {}
        self._state = ServiceState(1, (PoolState("main", 1, (), ("starting",)),))
        self._changed = asyncio.Event()
        self.watch = _Method(self._watch)
        self.describe = _Method(self._describe)
        self.may_describe = asyncio.Event()
        self.may_describe.set()

    def publish(self, *addresses: GangAddress, failure: str | None = None) -> None:
        states = ("ready",) * len(addresses) or ("starting",)
        self.publish_pools(PoolState("main", 1, addresses, states, failure, failure or "still loading"))

    def publish_pools(self, *pools: PoolState) -> None:
        self._state = ServiceState(self._state.version + 1, pools, self.links)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch(self, version: int, timeout_s: float, watcher: str) -> ServiceState:
        self.num_calls += 1
        if self.is_down:
            raise ActorUnavailableError("the actor is away", b"x" * 16)
        while self._state.version == version:
            await self._changed.wait()
        return self._state

    async def _describe(self) -> list[dict[str, Any]]:
        await self.may_describe.wait()
        return [{"pool": "main"}]


@contextlib.contextmanager
def _gang(gang_id: str, role: Role = "both") -> Iterator[tuple[FakeExecutor, GangAddress]]:
    executor = FakeExecutor(step_s=0.002)
    leader = LeaderServer(executor, "127.0.0.1", "s")
    port = leader.start()
    try:
        yield executor, GangAddress(gang_id, 1, role, "127.0.0.1", port, "s", FAKE_INFO)
    finally:
        leader.stop()
        executor.shutdown()


@contextlib.asynccontextmanager
async def _watching(supervisor: _FakeSupervisor) -> AsyncIterator[WatchedFleet]:
    fleet = WatchedFleet(cast(ActorHandle[PoolSupervisor], supervisor))
    try:
        yield fleet
    finally:
        await fleet.close()


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.005)


def _ids(fleet: WatchedFleet, role: Role = "both") -> list[str]:
    return sorted(link.gang_id for link in fleet.links(role))


def _request(num_tokens: int) -> GenerateRequest:
    return GenerateRequest("r", [1, 2], SamplingSpec(max_tokens=num_tokens))


async def _tokens(fleet: WatchedFleet, num_tokens: int) -> list[int]:
    link = fleet.links()[0]
    return [token async for chunk in link.generate(_request(num_tokens)) for token in chunk.token_ids]


def test_links_follow_the_gangs_and_open_requests_finish() -> None:
    async def body() -> None:
        supervisor = _FakeSupervisor()
        async with _watching(supervisor) as fleet:
            with pytest.raises(NotReady, match=r"pool main: gangs starting"):
                await fleet.wait_ready(0.1)
            supervisor.publish(one)
            await fleet.wait_ready(_PATIENCE_S)
            assert _ids(fleet) == ["one"]
            executor.hold()
            running = asyncio.create_task(_tokens(fleet, 100))
            await _until(lambda: executor.num_requests == 1)
            supervisor.publish(two)
            await _until(lambda: _ids(fleet) == ["two"])
            executor.hold(False)
            assert await running == fake_output([1, 2], 100)
            assert await fleet.describe() == [{"pool": "main"}]

    with _gang("one") as (executor, one), _gang("two") as (_, two):
        asyncio.run(body())


def test_while_the_supervisor_says_nothing_the_last_description_is_told() -> None:
    async def body() -> None:
        supervisor = _FakeSupervisor()
        async with asyncio.timeout(_PATIENCE_S), _watching(supervisor) as fleet:
            told = await fleet.last_description()
            supervisor.may_describe.clear()
            assert await fleet.last_description() == told
            asking = asyncio.create_task(fleet.describe())
            assert await fleet.last_description() == told
            assert not asking.done()  # it tells what is, and not what was
            supervisor.may_describe.set()
            assert await asking == told

    asyncio.run(body())


def test_a_role_is_served_by_gangs_of_that_role_and_of_both() -> None:
    async def body() -> None:
        supervisor = _FakeSupervisor()
        async with _watching(supervisor) as fleet:
            supervisor.publish(prefill, both)
            await _until(lambda: len(_ids(fleet, "prefill")) == 2)
            assert _ids(fleet, "decode") == ["b"]
            assert _ids(fleet, "both") == ["b"]

    with _gang("p", "prefill") as (_, prefill), _gang("b") as (_, both):
        asyncio.run(body())


def test_a_gang_that_decodes_makes_the_service_ready() -> None:
    async def body() -> None:
        supervisor = _FakeSupervisor()
        async with _watching(supervisor) as fleet:
            failed = PoolState("prefill", 1, (), ("failed",), "no memory", "no memory", "prefill")
            starting = PoolState("decode", 1, (), ("starting",), role="decode")
            supervisor.publish_pools(failed, starting)
            with pytest.raises(NotReady, match="pool prefill: gangs failed"):
                await fleet.wait_ready(0.2)
            supervisor.publish_pools(failed, PoolState("decode", 1, (decode,), ("ready",), role="decode"))
            await fleet.wait_ready(_PATIENCE_S)
            assert _ids(fleet, "decode") == ["d"]
            assert _ids(fleet, "prefill") == []
            supervisor.publish_pools(failed, PoolState("decode", 1, (), ("draining",), role="decode"))
            await _until(lambda: not fleet.links("decode"))
            with pytest.raises(NotReady, match="shutting down"):
                await fleet.wait_ready(_PATIENCE_S)

    with _gang("d", "decode") as (_, decode):
        asyncio.run(body())


def test_links_have_the_measured_kv_links() -> None:
    async def body() -> None:
        supervisor = _FakeSupervisor()
        async with _watching(supervisor) as fleet:
            supervisor.publish(one, two)
            await _until(lambda: len(_ids(fleet)) == 2)
            link = LinkMeasurement(2e9, 0.001)
            supervisor.links = {("one", "p"): link, ("two", "p"): LinkMeasurement(0.0, 0.0, "refused")}
            supervisor.publish(one, two)
            links = {link.gang_id: link for link in fleet.links()}
            await _until(lambda: links["one"].kv_links == {"p": link})
            assert links["two"].kv_links == {}

    with _gang("one") as (_, one), _gang("two") as (_, two):
        asyncio.run(body())


def test_a_broken_link_is_reconnected_while_its_gang_is_published() -> None:
    async def body() -> None:
        supervisor = _FakeSupervisor()
        async with _watching(supervisor) as fleet:
            supervisor.publish(address)
            await fleet.wait_ready(_PATIENCE_S)
            before = fleet.links()[0]
            before.close()
            assert fleet.links() == []
            await fleet.wait_ready(_PATIENCE_S)
            assert fleet.links()[0] is not before
            assert await _tokens(fleet, 5) == fake_output([1, 2], 5)

    with _gang("one") as (_, address):
        asyncio.run(body())


def test_links_survive_a_supervisor_that_does_not_answer() -> None:
    async def body() -> None:
        supervisor = _FakeSupervisor()
        async with _watching(supervisor) as fleet:
            supervisor.publish(one)
            await fleet.wait_ready(_PATIENCE_S)
            supervisor.is_down = True
            supervisor.publish(one, two)  # the last answer before the calls fail
            await _until(lambda: len(_ids(fleet)) == 2 and supervisor.num_calls >= 3)
            assert await _tokens(fleet, 5) == fake_output([1, 2], 5)
            supervisor.is_down = False
            supervisor.publish(one)
            await _until(lambda: _ids(fleet) == ["one"])

    with _gang("one") as (_, one), _gang("two") as (_, two):
        asyncio.run(body())


def test_the_successor_of_a_supervisor_is_found() -> None:
    async def body() -> None:
        supervisor, successor = _FakeSupervisor(), _FakeSupervisor()
        searches = iter([ValueError("none yet"), successor])

        def find() -> ActorHandle[PoolSupervisor]:
            found = next(searches)
            if isinstance(found, ValueError):
                raise found
            return cast(ActorHandle[PoolSupervisor], found)

        fleet = WatchedFleet(cast(ActorHandle[PoolSupervisor], supervisor), find)
        supervisor.publish(one)
        await fleet.wait_ready(_PATIENCE_S)
        link = fleet.links()[0]
        successor.publish(one)
        supervisor.is_down = True
        supervisor.publish(one)  # the last answer before the calls fail
        await _until(lambda: successor.num_calls > 1)
        assert fleet.links() == [link], "a gang that serves on keeps its link"
        successor.publish(two)
        await _until(lambda: _ids(fleet) == ["two"])
        await fleet.close()

    with _gang("one") as (_, one), _gang("two") as (_, two):
        asyncio.run(body())


def test_a_pool_that_has_failed_ends_the_wait_with_its_reason() -> None:
    async def body() -> None:
        supervisor = _FakeSupervisor()
        async with _watching(supervisor) as fleet:
            supervisor.publish(failure="no such model")
            with pytest.raises(NotReady, match="pool main has failed: no such model"):
                await fleet.wait_ready(_PATIENCE_S)

    asyncio.run(body())


def test_a_static_fleet_offers_its_open_links() -> None:
    async def body() -> None:
        link = await SocketLink.connect(address, _PATIENCE_S)
        fleet = StaticFleet({"both": [link]})
        await fleet.wait_ready(_PATIENCE_S)
        assert fleet.links("decode") == [link]
        await fleet.close()
        assert fleet.links() == []
        with pytest.raises(NotReady):
            await fleet.wait_ready(_PATIENCE_S)
        with pytest.raises(WorkerLost):
            await anext(link.generate(_request(1)))

    with _gang("one") as (_, address):
        asyncio.run(body())


def test_a_static_fleet_keeps_roles_apart_and_is_ready_with_a_gang_that_decodes() -> None:
    async def body() -> None:
        sender, receiver = [await SocketLink.connect(gang, _PATIENCE_S) for gang in (prefill, decode)]
        fleet = StaticFleet({"prefill": [sender], "decode": [receiver]})
        await fleet.wait_ready(_PATIENCE_S)
        assert (fleet.links("prefill"), fleet.links("decode"), fleet.links("both")) == ([sender], [receiver], [])
        roles = [(pool["role"], [gang["gang_id"] for gang in pool["gangs"]]) for pool in await fleet.describe()]
        assert roles == [("prefill", ["p"]), ("decode", ["d"])]
        receiver.close()
        await fleet.wait_link(_PATIENCE_S)
        with pytest.raises(NotReady, match="decodes"):
            await fleet.wait_ready(_PATIENCE_S)
        await fleet.close()
        with pytest.raises(NotReady):
            await fleet.wait_link(_PATIENCE_S)

    with _gang("p", "prefill") as (_, prefill), _gang("d", "decode") as (_, decode):
        asyncio.run(body())
