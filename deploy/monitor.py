"""What a driver does while its service is up: it reports changes of the pools, and ends a service that cannot go on.

the gangs of all pools fail for `limits.outage_timeout_s` ─▶ ServiceFailed     the service is shut down in order
Ray is dead on this host, or silent ──────────────────────▶ RayLost           nothing is left to shut it down with
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayError

_PERIOD_S: Final = 2.0
_ASK_TIMEOUT_S: Final = 10.0
_SILENCE_S: Final = 45.0
"""Less than the 60 s after which Ray itself ends a process that cannot reach the head, without a message."""
_CLOSE_TIMEOUT_S: Final = 20.0

Pools = Sequence[dict[str, Any]]


class ServiceFailed(Exception):
    """No gang can serve requests, and none will soon."""


class RayLost(Exception):
    """Ray is gone, on this host or on the head node."""


class Stop(Protocol):
    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the service has been asked to stop."""


class Cluster(Protocol):
    """The Ray cluster that the service runs on."""

    def is_node_alive(self) -> bool | None:
        """Whether Ray considers this host alive; None if Ray does not answer."""

    def pools(self) -> Pools | None:
        """The pools; None if the service actor does not answer."""


class RayCluster:
    """Asks the head, on a thread because Ray's own call has no time limit, and the service actor."""

    def __init__(self, service_actor: Any) -> None:
        self._service_actor = service_actor
        self._node_id = ray.get_runtime_context().get_node_id()

    def is_node_alive(self) -> bool | None:
        found: list[bool] = []
        asking = threading.Thread(target=lambda: found.append(self._look()), name="ask-ray", daemon=True)
        asking.start()
        asking.join(_ASK_TIMEOUT_S)
        return found[0] if found else None

    def _look(self) -> bool:
        return any(node["NodeID"] == self._node_id and node["Alive"] for node in ray.nodes())

    def pools(self) -> Pools | None:
        try:
            return ray.get(self._service_actor.describe_pools.remote(), timeout=_ASK_TIMEOUT_S) or ()
        except (GetTimeoutError, RayError):
            return None


def monitor(
    cluster: Cluster,
    stop: Stop,
    outage_timeout_s: float,
    report: Callable[[Pools], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return when the service has been asked to stop. Raises ServiceFailed, RayLost."""
    ray_answered_s = actor_answered_s = served_s = clock()
    while not stop.wait(_PERIOD_S):
        is_alive = cluster.is_node_alive()
        if is_alive is False:
            raise RayLost("Ray considers this host dead: its raylet has ended, or the head cannot reach it")
        if is_alive:
            ray_answered_s = clock()
        elif clock() - ray_answered_s > _SILENCE_S:
            raise RayLost(f"the head of the Ray cluster has not answered for {_SILENCE_S:g} s")
        else:
            continue
        pools = cluster.pools()
        if pools is None:
            if clock() - actor_answered_s > _SILENCE_S:
                raise RayLost(f"the service actor on the head node has not answered for {_SILENCE_S:g} s")
            continue
        actor_answered_s = clock()
        report(pools)
        failure = _failure(pools)
        if failure is None:
            served_s = clock()
        elif clock() - served_s > outage_timeout_s:
            raise ServiceFailed(
                f"no gang has served requests for {outage_timeout_s:g} s (limits.outage_timeout_s): {failure}"
            )


def _failure(pools: Pools) -> str | None:
    """Why no request can be answered; None unless every pool that decodes has failed."""
    decoding = [pool for pool in pools if pool["role"] != "prefill"]
    if not decoding or not all(pool["failure"] for pool in decoding):
        return None
    return "; ".join(f"pool {pool['pool']}: {pool['failure']}" for pool in decoding)


def abandon_ray() -> bool:
    """Disconnect from a Ray that is gone. Return False if that takes too long, so that only exiting is left."""
    leaving = threading.Thread(target=ray.shutdown, name="leave-ray", daemon=True)
    leaving.start()
    leaving.join(_CLOSE_TIMEOUT_S)
    return not leaving.is_alive()
