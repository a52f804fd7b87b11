"""`Fleet`: the gangs that accept requests now, from which the dispatcher chooses.

`StaticFleet` has fixed links. `WatchedFleet` follows a supervisor: it opens a link to each gang that is published, and
closes the links of gangs that end. While the supervisor cannot be reached, open links keep working.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from ray.actor import ActorHandle
from ray.exceptions import RayError

from tensorweave.cluster.adapter import Adapter
from tensorweave.cluster.errors import NotReady, TensorweaveError
from tensorweave.cluster.latest_answer import LatestAnswer
from tensorweave.cluster.link import GangLink
from tensorweave.cluster.pool_spec import PoolState
from tensorweave.cluster.protocol import GangAddress, LinkMeasurement, Role
from tensorweave.cluster.service_state import ServiceState
from tensorweave.cluster.socket_link import SocketLink
from tensorweave.cluster.supervisor import PoolSupervisor

logger = logging.getLogger(__name__)

_ENDING: Final = frozenset({"draining", "stopped"})
_POLL_S: Final = 10.0
_POLL_GRACE_S: Final = 10.0
_RETRY_S: Final = 0.5
_DESCRIBE_TIMEOUT_S: Final = 5.0
_RETRY_AFTER_S: Final = 5.0


class Fleet(Protocol):
    """Used on one event loop."""

    def links(self, role: Role = "both") -> Sequence[GangLink]:
        """Open links to gangs that serve `role`; a gang of role 'both' serves every role but 'embed'."""

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """LoRA adapters that requests may name, by name."""

    def check_open(self) -> None:
        """Raises NotReady once the service is shutting down. Running requests may continue, on any gang."""

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until a gang that decodes is reachable. Raises NotReady, with the reason, at the timeout or once its
        pool has failed."""

    async def wait_link(self, timeout_s: float, role: Role | None = None) -> None:
        """Wait until a gang that serves `role` is reachable; None: any gang, whatever its role. Raises NotReady."""

    async def describe(self) -> list[dict[str, Any]]:
        """Pools, gangs and ranks, as they are. Raises NotReady."""

    async def last_description(self) -> list[dict[str, Any]]:
        """The same at once, for probes: as they were at most 10 s ago if nothing newer is known within 20 ms."""

    async def close(self) -> None:
        """Close every link. The gangs keep running."""


class StaticFleet:
    """Links by the role of their gangs. `close` closes them."""

    adapters: Mapping[str, Adapter] = {}

    def __init__(self, links: Mapping[Role, Sequence[GangLink]]) -> None:
        self._links = {role: tuple(gangs) for role, gangs in links.items()}

    def links(self, role: Role = "both") -> Sequence[GangLink]:
        return [link for own_role, link in self._all() if link.is_open and serves(own_role, role)]

    def check_open(self) -> None:
        return None

    async def wait_ready(self, timeout_s: float) -> None:
        if not self.links("decode"):
            raise NotReady("no gang that decodes is open")

    async def wait_link(self, timeout_s: float, role: Role | None = None) -> None:
        if not any(link.is_open and (role is None or serves(own_role, role)) for own_role, link in self._all()):
            raise NotReady("no gang is open")

    async def describe(self) -> list[dict[str, Any]]:
        return [_describe_static(role, links) for role, links in self._links.items()]

    async def last_description(self) -> list[dict[str, Any]]:
        return await self.describe()

    async def close(self) -> None:
        for _, link in self._all():
            link.close()

    def _all(self) -> Iterator[tuple[Role, GangLink]]:
        return ((role, link) for role, links in self._links.items() for link in links)


def serves(own: Role, wanted: Role) -> bool:
    """Whether a gang of one role takes requests for the other."""
    return own == wanted or (own == "both" and wanted != "embed")


def _describe_static(role: Role, links: Sequence[GangLink]) -> dict[str, Any]:
    gangs = [
        {"gang_id": link.gang_id, "state": "ready" if link.is_open else "stopped", "num_inflight": link.num_inflight}
        for link in links
    ]
    return {"pool": "static", "role": role, "replicas": len(gangs), "gangs": gangs, "failure": None}


class WatchedFleet:
    """Follows a `PoolSupervisor`. Construct it inside the event loop that uses it, then call `wait_ready`.

    `find` looks up the supervisor's successor: it blocks, and raises ValueError if there is none yet.
    """

    def __init__(
        self,
        supervisor: ActorHandle[PoolSupervisor],
        find: Callable[[], ActorHandle[PoolSupervisor]] | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._find = find
        self._state = ServiceState(0, ())
        self._name = secrets.token_hex(8)
        self.adapters: Mapping[str, Adapter] = {}
        self._links: dict[str, SocketLink] = {}
        self._kv_links: Mapping[str, Mapping[str, LinkMeasurement]] = {}
        self._link_tasks: dict[str, asyncio.Task[None]] = {}
        self._published: dict[str, GangAddress] = {}
        self._changed = asyncio.Event()
        self._retired: set[SocketLink] = set()
        self._refusals: dict[str, str] = {}
        self._last_description = LatestAnswer(self.describe)
        self._follower = asyncio.create_task(self._follow(), name="fleet")

    def links(self, role: Role = "both") -> Sequence[GangLink]:
        return [link for link in self._links.values() if link.is_open and serves(link.address.role, role)]

    def check_open(self) -> None:
        """The service is shutting down if all gangs that decode are ending. Prefill gangs end later."""
        pools = [pool for pool in self._state.pools if pool.role != "prefill"]
        if pools and all(map(_is_ending, pools)):
            raise NotReady("the service is shutting down", retry_after_s=_RETRY_AFTER_S)

    async def wait_ready(self, timeout_s: float) -> None:
        await self._wait_until(self._is_ready, timeout_s)

    async def wait_link(self, timeout_s: float, role: Role | None = None) -> None:
        def is_reachable() -> bool:
            links = [link for link in self._links.values() if link.is_open] if role is None else self.links(role)
            return bool(links) or (role is None and self._is_ready())

        await self._wait_until(is_reachable, timeout_s)

    async def _wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            raise NotReady(f"not ready within {timeout_s:g} s: {self._explain_unready()}") from None

    async def last_description(self) -> list[dict[str, Any]]:
        return await self._last_description.get()

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
        self._last_description.close()
        for task in self._link_tasks.values():
            task.cancel()
        for link in (*self._links.values(), *self._retired):
            link.close()
        await asyncio.wait([self._follower, *self._link_tasks.values()], timeout=5.0)

    # ---- readiness

    def _is_ready(self) -> bool:
        """One gang that decodes is enough, because it computes prompts itself if there is no prefill gang."""
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

    def _explain_unready(self) -> str:
        unready = [
            f"pool {pool.name}: gangs {', '.join(pool.states)}" + (f" ({pool.trouble})" if pool.trouble else "")
            for pool in self._state.pools
            if not self._has_link(pool)
        ]
        return "; ".join([*unready, *self._refusals.values()]) or "the supervisor has not answered"

    # ---- following the supervisor

    async def _follow(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_POLL_S + _POLL_GRACE_S):
                    state = await self._supervisor.watch.remote(self._state.version, _POLL_S, self._name)
            except (TimeoutError, RayError) as error:
                logger.warning("the supervisor does not answer (%s); trying again", type(error).__name__)
                await asyncio.sleep(_RETRY_S)
                await self._find_successor()
                continue
            self._state = state
            self.adapters = {adapter.name: adapter for adapter in state.adapters}
            self._update_link_tasks(state)
            self._kv_links = state.usable_links()
            for link in self._links.values():
                self._update_kv_links(link)

    async def _find_successor(self) -> None:
        if self._find is None:
            return
        try:
            self._supervisor = await asyncio.to_thread(self._find)
        except (ValueError, RayError) as error:
            logger.warning("there is no supervisor yet: %s", str(error).partition("\n")[0])

    def _update_link_tasks(self, state: ServiceState) -> None:
        """Maintain a link to each published gang, and to no other."""
        published = {address.gang_id: address for address in _addresses(state)}
        for gang_id, known in self._published.items():
            if published.get(gang_id) != known:  # it has ended, or has another role now
                self._link_tasks.pop(gang_id).cancel()
                self._refusals.pop(gang_id, None)
        self._published = published
        for gang_id, address in published.items():
            if gang_id not in self._link_tasks:
                self._link_tasks[gang_id] = asyncio.create_task(self._maintain_link(address), name=f"link-{gang_id}")
        self._notify()

    async def _maintain_link(self, address: GangAddress) -> None:
        """Connect to this gang, again whenever the link breaks, until the task is cancelled."""
        while True:
            try:
                link = await SocketLink.connect(address)
            except TensorweaveError as error:
                self._note_refusal(address.gang_id, error.message)
                await asyncio.sleep(_RETRY_S)
                continue
            self._refusals.pop(address.gang_id, None)
            self._links[address.gang_id] = link
            self._update_kv_links(link)
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

    def _note_refusal(self, gang_id: str, reason: str) -> None:
        """Log the reason once, not at every attempt. `describe` and `wait_ready` report it until a link is open."""
        if self._refusals.get(gang_id) != reason:
            self._refusals[gang_id] = reason
            logger.warning("gang %s: %s", gang_id, reason)

    def _update_kv_links(self, link: SocketLink) -> None:
        link.kv_links = self._kv_links.get(link.gang_id, {})

    def _retire(self, link: SocketLink) -> None:
        """Close the link once its open requests have ended. The link of a killed gang ends by itself."""
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
