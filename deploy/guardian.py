"""The service's last hand: a detached actor that drains and takes the service down when its driver asks, or when its
driver is gone.

Serve outlives the process that deployed it, so a driver that is killed (`ray job stop` does so after 3 s) would leave
it running. The guardian also is the mark that a cluster carries a service: there is at most one. Ray starts it again
when it dies, and it looks for the driver anew: whichever of the two goes first, nothing stays.

    driver ──end()──────▶ guardian ──▶ gangs finish their requests, take no new ones ──▶ serve.shutdown()
       └─its Lifeline ends──▶┘
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import threading
from collections.abc import Sequence
from typing import Any, Final

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError

from tensorweave.cluster.owner_liveness import wait_for_end
from tensorweave.cluster.supervisor import find_supervisor
from tensorweave.deploy.home import APP_NAME, GUARDIAN_NAME, NAMESPACE, supervisor_home
from tensorweave.deploy.ingress import taken_ports

logger = logging.getLogger(__name__)

DRAIN_SLACK_S: Final = 15.0
SERVE_SHUTDOWN_TIMEOUT_S: Final = 60.0
_PROBE_TIMEOUT_S: Final = 3.0
_STOP_TIMEOUT_S: Final = 30.0
_NUM_END_TRIES: Final = 3


class Guardian:
    """An actor on the head node, beside the routers. `drain_timeout_s` is what running requests get to finish.

    It follows the driver's `lifeline` on a thread of its own, for nobody calls it when Ray has started it again.
    """

    def __init__(self, drain_timeout_s: float, lifeline: str) -> None:
        self._drain_timeout_s = drain_timeout_s
        self._home = supervisor_home(APP_NAME)
        self._ending: asyncio.Task[None] | None = None
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        threading.Thread(target=_outlive_driver, args=(lifeline,), name="outlive-driver", daemon=True).start()

    def taken_ports(self, host: str, ports: Sequence[int]) -> list[int]:
        return taken_ports(host, ports)

    async def probe(self, host: str, port: int, path: str) -> int | None:
        """The status of a GET on this node; None when nobody answers."""
        return await asyncio.to_thread(_get_status, host, port, path)

    async def describe_pools(self) -> list[dict[str, Any]] | None:
        """What the supervisor tells of its pools; None while there is none."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                supervisor = await asyncio.to_thread(find_supervisor, self._home)
                pools: list[dict[str, Any]] = await supervisor.describe.remote()
        except (ValueError, RayError, TimeoutError):
            return None
        return pools

    async def end(self) -> None:
        """Drain, then take Serve and with it the gangs down. Calling it again waits for the same end, or tries again
        where that has failed."""
        if self._ending is None or _has_failed(self._ending):
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        pools = await self.describe_pools()
        is_unknown = pools is None  # slow to answer: requests may be running all the same
        if is_unknown or any(gang["state"] == "ready" for pool in pools or () for gang in pool["gangs"]):
            await self._drain()
        try:
            async with asyncio.timeout(SERVE_SHUTDOWN_TIMEOUT_S):
                await serve.shutdown_async()
        finally:
            await self._end_supervisor()

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._drain_timeout_s + DRAIN_SLACK_S):
                supervisor = await asyncio.to_thread(find_supervisor, self._home)
                await supervisor.drain.remote(self._drain_timeout_s)
        except ValueError:
            return
        except (RayError, TimeoutError) as error:
            logger.warning("draining was cut short: %s: %s", type(error).__name__, error)

    async def _end_supervisor(self) -> None:
        """After Serve, whose health check would start another one."""
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                supervisor = await asyncio.to_thread(find_supervisor, self._home)
                await supervisor.stop.remote()
        except ValueError:
            return
        except (RayError, TimeoutError) as error:
            logger.warning("the supervisor did not stop cleanly: %s: %s", type(error).__name__, error)
        ray.kill(supervisor)


def _has_failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _outlive_driver(lifeline: str) -> None:
    """When the driver is gone: end the service, whatever it takes, and then this actor.

    This runs outside the actor's tasks: Ray lets an actor exit only when the tasks that it has called are over, so a
    task that the actor calls on itself cannot exit it.
    """
    wait_for_end(lifeline)
    logger.warning("the driver is gone: taking the service down")
    guardian = ray.get_runtime_context().current_actor
    for _ in range(_NUM_END_TRIES):
        try:
            guardian.end.remote().future().result()
            break
        except RayError as error:
            logger.error("the service could not be taken down: %s", error)
    ray.kill(guardian, no_restart=True)


def _get_status(host: str, port: int, path: str) -> int | None:
    connection = http.client.HTTPConnection(host, port, timeout=_PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def find_guardian() -> ActorHandle[Any] | None:
    """The cluster's guardian, if it carries a service."""
    try:
        guardian: ActorHandle[Any] = ray.get_actor(GUARDIAN_NAME, namespace=NAMESPACE)
    except ValueError:
        return None
    return guardian
