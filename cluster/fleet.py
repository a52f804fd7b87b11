"""The set of gangs that can take work now: what the dispatcher picks from.

`StaticFleet` holds given links; `WatchedFleet` follows a supervisor, opens a link to each gang it publishes, and lets
go of those that end. A supervisor that cannot be reached for a while harms nothing: open links keep working.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from ray.actor import ActorHandle
from ray.exceptions import RayError

from tensorweave.cluster.errors import NotReady, TensorweaveError
from tensorweave.cluster.link import GangLink
from tensorweave.cluster.pool import PoolState
from tensorweave.cluster.protocol import GangAddress, Role
from tensorweave.cluster.service_state import ServiceState
from tensorweave.cluster.socket_link import SocketLink
from tensorweave.cluster.supervisor import PoolSupervisor

logger = logging.getLogger(__name__)

_ENDING: Final = frozenset({"draining", "stopped"})
_POLL_S: Final = 10.0
_POLL_GRACE_S: Final = 10.0
_RETRY_S: Final = 0.5
_DESCRIBE_TIMEOUT_S: Final = 5.0
_RETRY_ELSEWHERE_S: Final = 5.0


class Fleet(Protocol):
    """Used on one event loop."""

    def links(self, role: Role = "both") -> Sequence[GangLink]:
        """Open links to gangs that serve `role`; a gang of role 'both' serves any."""

    def check_open(self) -> None:
        """Raises NotReady once the service is shutting down: what runs may go on, on any gang; nothing new begins."""

    async def wait_ready(self, timeout_s: float) -> None:
        """Until a gang can answer (one that decodes). Raises NotReady at the timeout, or once their pool has failed; it
        says why."""

    async def wait_link(self, timeout_s: float) -> None:
        """Until any gang can be reached, whatever its role. Raises NotReady."""

    async def describe(self) -> list[dict[str, Any]]:
        """For health pages: pools, gangs, ranks."""

    async def close(self) -> None:
        """Close every link; the gangs live on."""


class StaticFleet:
    """Given links, by the role of their gangs. It owns them: `close` closes them."""

    def __init__(self, links: Mapping[Role, Sequence[GangLink]]) -> None:
        self._links = {role: tuple(gangs) for role, gangs in links.items()}

    def links(self, role: Role = "both") -> Sequence[GangLink]:
        return [link for own, link in self._all() if link.is_open and own in (role, "both")]

    def check_open(self) -> None:
        return None

    async def wait_ready(self, timeout_s: float) -> None:
        if not self.links("decode"):
            raise NotReady("no gang that decodes is open")

    async def wait_link(self, timeout_s: float) -> None:
        if not any(link.is_open for _, link in self._all()):
            raise NotReady("no gang is open")

    async def describe(self) -> list[dict[str, Any]]:
        return [_describe_static(role, links) for role, links in self._links.items()]

    async def close(self) -> None:
        for _, link in self._all():
            link.close()

    def _all(self) -> Iterator[tuple[Role, GangLink]]:
        return ((role, link) for role, links in self._links.items() for link in links)


def _describe_static(role: Role, links: Sequence[GangLink]) -> dict[str, Any]:
    gangs = [
        {"gang_id": link.gang_id, "state": "ready" if link.is_open else "stopped", "num_inflight": link.num_inflight}
        for link in links
    ]
    return {"pool": "static", "role": role, "replicas": len(gangs), "gangs": gangs, "failure": None}


class WatchedFleet:
    """Follows a `PoolSupervisor`. Construct it inside the event loop that will use it, then `wait_ready`.

    `find` looks a supervisor's successor up where there may be one: it blocks, and raises ValueError where there is
    none yet.
    """

    def __init__(
        self,
        supervisor: ActorHandle[PoolSupervisor],
        find: Callable[[], ActorHandle[PoolSupervisor]] | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._find = find
        self._state = ServiceState(0, ())
        self._links: dict[str, SocketLink] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._retired: set[SocketLink] = set()
        self._refusals: dict[str, str] = {}
        self._follower = asyncio.create_task(self._follow(), name="fleet")

    def links(self, role: Role = "both") -> Sequence[GangLink]:
        return [link for link in self._links.values() if link.is_open and link.address.role in (role, "both")]

    def check_open(self) -> None:
        """Gangs that decode end first: those that prefill stay a while for what runs, and take no new work."""
        pools = [pool for pool in self._state.pools if pool.role != "prefill"]
        if pools and all(map(_is_ending, pools)):
            raise NotReady("the service is shutting down", retry_after_s=_RETRY_ELSEWHERE_S)

    async def wait_ready(self, timeout_s: float) -> None:
        await self._wait(self._is_ready, timeout_s)

    async def wait_link(self, timeout_s: float) -> None:
        await self._wait(lambda: any(link.is_open for link in self._links.values()) or self._is_ready(), timeout_s)

    async def _wait(self, holds: Callable[[], bool], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not holds():
                    await self._changed.wait()
        except TimeoutError:
            raise NotReady(f"not ready within {timeout_s:g} s: {self._why_not()}") from None

    async def describe(self) -> list[dict[str, Any]]:
        try:
            async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
                pools: list[dict[str, Any]] = await self._supervisor.describe.remote()
        except (TimeoutError, RayError) as error:
            raise NotReady(f"the supervisor does not answer: {type(error).__name__}") from error
        for gang in (gang for pool in pools for gang in pool.get("gangs", ())):
            if refusal := self._refusals.get(gang.get("gang_id", "")):
                gang["reason"] = refusal
        return pools

    async def close(self) -> None:
        self._follower.cancel()
        for keeper in self._keepers.values():
            keeper.cancel()
        for link in (*self._links.values(), *self._retired):
            link.close()
        await asyncio.wait([self._follower, *self._keepers.values()], timeout=5.0)

    # ---- readiness

    def _is_ready(self) -> bool:
        """A gang that decodes is enough: without a prefill gang it computes prompts itself."""
        pools = [pool for pool in self._state.pools if pool.role != "prefill"]
        if any(self._has_link(pool) for pool in pools):
            return True
        for pool in pools:
            if pool.failure is not None:
                raise NotReady(f"pool {pool.name} has failed: {pool.failure}")
            if _is_ending(pool):
                raise NotReady("the service is shutting down")
        return False

    def _has_link(self, pool: PoolState) -> bool:
        links = (self._links.get(address.gang_id) for address in pool.addresses)
        return any(link is not None and link.is_open for link in links)

    def _why_not(self) -> str:
        waiting = [
            f"pool {pool.name}: gangs {', '.join(pool.states)}" + (f" ({pool.trouble})" if pool.trouble else "")
            for pool in self._state.pools
            if not self._has_link(pool)
        ]
        return "; ".join([*waiting, *self._refusals.values()]) or "the supervisor has not answered"

    # ---- following the supervisor

    async def _follow(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_POLL_S + _POLL_GRACE_S):
                    state = await self._supervisor.watch.remote(self._state.version, _POLL_S)
            except (TimeoutError, RayError) as error:
                logger.warning("the supervisor does not answer (%s); trying again", type(error).__name__)
                await asyncio.sleep(_RETRY_S)
                await self._look_again()
                continue
            self._state = state
            self._match(state)
            for link in self._links.values():
                self._show_links(link)

    async def _look_again(self) -> None:
        if self._find is None:
            return
        try:
            self._supervisor = await asyncio.to_thread(self._find)
        except (ValueError, RayError) as error:
            logger.warning("there is no supervisor yet: %s", str(error).partition("\n")[0])

    def _match(self, state: ServiceState) -> None:
        """Keep a link to each published gang, and to no other."""
        published = {address.gang_id: address for address in _addresses(state)}
        for gang_id in self._keepers.keys() - published.keys():
            self._keepers.pop(gang_id).cancel()
            self._refusals.pop(gang_id, None)
        for gang_id, address in published.items():
            if gang_id not in self._keepers:
                self._keepers[gang_id] = asyncio.create_task(self._keep(address), name=f"keep-{gang_id}")
        self._notify()

    async def _keep(self, address: GangAddress) -> None:
        """A link to this gang for as long as it is published; one that breaks is opened again."""
        while True:
            try:
                link = await SocketLink.connect(address)
            except TensorweaveError as error:
                self._note_refusal(address.gang_id, error.message)
                await asyncio.sleep(_RETRY_S)
                continue
            self._refusals.pop(address.gang_id, None)
            self._links[address.gang_id] = link
            self._show_links(link)
            self._notify()
            try:
                await link.wait_closed()
            except asyncio.CancelledError:
                self._retire(link)
                raise
            finally:
                del self._links[address.gang_id]
                self._notify()
            await asyncio.sleep(_RETRY_S)

    def _note_refusal(self, gang_id: str, why: str) -> None:
        """Logged once, not at every try; told in `describe` and by `wait_ready` until a link is open."""
        if self._refusals.get(gang_id) != why:
            self._refusals[gang_id] = why
            logger.warning("gang %s: %s", gang_id, why)

    def _show_links(self, link: SocketLink) -> None:
        link.kv_links = {
            prefill: measurement
            for (decode, prefill), measurement in self._state.links.items()
            if decode == link.gang_id and measurement.error is None
        }

    def _retire(self, link: SocketLink) -> None:
        """No new work; what is open on it may end. A killed gang's link ends by itself."""
        self._retired = {old for old in self._retired if old.is_open} | {link}
        link.close_when_idle()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _is_ending(pool: PoolState) -> bool:
    return bool(pool.states) and set(pool.states) <= _ENDING


def _addresses(state: ServiceState) -> Iterator[GangAddress]:
    for pool in state.pools:
        yield from pool.addresses
