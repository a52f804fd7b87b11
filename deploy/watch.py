"""What a driver does while its service is up: it tells what becomes of the pools, and ends a service that cannot go on.

pools whose gangs all fail for `limits.outage_timeout_s` ─▶ ServiceFailed     the service is taken down in order
Ray dead on this host, or silent ────────────────────────▶ RayLost           there is nothing left to take down by
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayError

_TURN_S: Final = 2.0
_ASK_TIMEOUT_S: Final = 10.0
_SILENCE_S: Final = 45.0
"""Ray's own patience with a head that is gone is 60 s, after which it ends this process without a word."""
_CLOSE_TIMEOUT_S: Final = 20.0

Pools = Sequence[dict[str, Any]]


class ServiceFailed(Exception):
    """No gang can serve, and none will soon."""


class RayLost(Exception):
    """Ray is gone under the service, here or at the head."""


class Stop(Protocol):
    def wait(self, timeout_s: float | None = None) -> bool:
        """True once the service has been asked to stop."""


class Cluster(Protocol):
    """The service's Ray: `RayCluster`, or a test's."""

    def is_node_alive(self) -> bool | None:
        """Whether Ray counts this host as alive; None where it does not answer."""

    def pools(self) -> Pools | None:
        """None where the guardian does not answer; none where it knows of none."""


class RayCluster:
    """Asks the head, on a thread where Ray's own call has no limit, and the service's guardian."""

    def __init__(self, guardian: Any) -> None:
        self._guardian = guardian
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
            return ray.get(self._guardian.describe_pools.remote(), timeout=_ASK_TIMEOUT_S) or ()
        except (GetTimeoutError, RayError):
            return None


def watch(
    cluster: Cluster,
    stop: Stop,
    outage_timeout_s: float,
    tell: Callable[[Pools], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Returns when the service has been asked to stop. Raises ServiceFailed, RayLost."""
    heard_s = answered_s = served_s = clock()
    while not stop.wait(_TURN_S):
        is_alive = cluster.is_node_alive()
        if is_alive is False:
            raise RayLost("Ray counts this host as dead: its raylet has ended, or the head cannot reach it")
        if is_alive:
            heard_s = clock()
        elif clock() - heard_s > _SILENCE_S:
            raise RayLost(f"the head of the Ray cluster has not answered for {_SILENCE_S:g} s")
        else:
            continue
        pools = cluster.pools()
        if pools is None:
            if clock() - answered_s > _SILENCE_S:
                raise RayLost(f"the service's guardian on the head node has not answered for {_SILENCE_S:g} s")
            continue
        answered_s = clock()
        tell(pools)
        failure = _failure(pools)
        if failure is None:
            served_s = clock()
        elif clock() - served_s > outage_timeout_s:
            raise ServiceFailed(f"nothing has served for {outage_timeout_s:g} s (limits.outage_timeout_s): {failure}")


def _failure(pools: Pools) -> str | None:
    """Why no request can be answered, where each pool that decodes has failed."""
    decoding = [pool for pool in pools if pool["role"] != "prefill"]
    if not decoding or not all(pool["failure"] for pool in decoding):
        return None
    return "; ".join(f"pool {pool['pool']}: {pool['failure']}" for pool in decoding)


def abandon_ray() -> bool:
    """Leave a Ray that is gone; False where that does not end in time, and only the end of this process will do."""
    leaving = threading.Thread(target=ray.shutdown, name="leave-ray", daemon=True)
    leaving.start()
    leaving.join(_CLOSE_TIMEOUT_S)
    return not leaving.is_alive()
