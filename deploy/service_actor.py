"""`ServiceActor`: a detached actor that drains and shuts down the service when its driver asks, or when its driver
dies.

Serve outlives the process that deployed it, so a driver that is killed (`ray job stop` does so after 3 s) would leave
it running. There is at most one such actor on a cluster, so its name also tells whether a service runs there. Ray
restarts it when it dies, and it then looks for the driver again: whichever of the two dies first, nothing is left.

    driver ──end()─────────▶ ServiceActor ──▶ gangs finish their requests, accept no new ones ──▶ serve.shutdown()
       └─its ProcessSentinel ends──▶┘
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

from tensorweave.cluster.log_setup import LogSettings, set_up_logging
from tensorweave.cluster.process_sentinel import wait_for_owner_end
from tensorweave.cluster.supervisor_handle import find_supervisor
from tensorweave.cluster.tls import check_listener_files, pinned_context
from tensorweave.deploy.actor_names import APP_NAME, NAMESPACE, SERVICE_ACTOR_NAME, supervisor_home
from tensorweave.deploy.ingress import taken_ports

logger = logging.getLogger(__name__)

DRAIN_SLACK_S: Final = 15.0
SERVE_SHUTDOWN_TIMEOUT_S: Final = 60.0
_PROBE_TIMEOUT_S: Final = 3.0
_STOP_TIMEOUT_S: Final = 30.0
_NUM_END_TRIES: Final = 3


class ServiceActor:
    """Runs on the head node, beside the routers. Running requests have `drain_timeout_s` to finish.

    A thread of its own waits for the end of the driver's `sentinel`, because nothing calls the actor after Ray has
    restarted it.
    """

    def __init__(self, drain_timeout_s: float, sentinel: str, log: LogSettings | None = None) -> None:
        set_up_logging(log or LogSettings(), "service actor")
        self._drain_timeout_s = drain_timeout_s
        self._home = supervisor_home(APP_NAME)
        self._ending: asyncio.Task[None] | None = None
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        threading.Thread(target=_end_after_driver, args=(sentinel,), name="wait-for-driver", daemon=True).start()

    def taken_ports(self, host: str, ports: Sequence[int]) -> list[int]:
        return taken_ports(host, ports)

    async def probe(self, host: str, port: int, path: str, certificate: str | None = None) -> int | None:
        """The status of a GET on this node, over HTTPS if a certificate is given, which the server must show; None if
        there is no answer."""
        return await asyncio.to_thread(_get_status, host, port, path, certificate)

    async def why_no_https(self, table: str, certificate: str, key: str) -> str | None:
        """Why a listener of this node cannot use these files; None if it can."""
        try:
            check_listener_files(table, certificate, key)
        except ValueError as error:
            return str(error)
        return None

    async def describe_pools(self) -> list[dict[str, Any]] | None:
        """The supervisor's description of its pools; None if there is no supervisor or it does not answer."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                supervisor = await asyncio.to_thread(find_supervisor, self._home)
                pools: list[dict[str, Any]] = await supervisor.describe.remote()
        except (ValueError, RayError, TimeoutError):
            return None
        return pools

    async def end(self) -> None:
        """Drain, then shut down Serve and the gangs. A second call waits for the first, or tries again if that
        failed."""
        if self._ending is None or _has_failed(self._ending):
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        pools = await self.describe_pools()
        is_unknown = pools is None  # it may only be slow: requests may be running
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
        """Stop it after Serve, whose health check would start another one."""
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


def _end_after_driver(sentinel: str) -> None:
    """Wait until the driver is gone, end the service with several tries, then kill this actor.

    This runs outside the actor's tasks: Ray lets an actor exit only after the tasks that it has called, so a task that
    the actor calls on itself cannot exit it.
    """
    wait_for_owner_end(sentinel)
    logger.warning("the driver is gone: shutting down the service")
    service_actor = ray.get_runtime_context().current_actor
    for _ in range(_NUM_END_TRIES):
        try:
            service_actor.end.remote().future().result()
            break
        except RayError as error:
            logger.error("the service could not be shut down: %s", error)
    ray.kill(service_actor, no_restart=True)


def _get_status(host: str, port: int, path: str, certificate: str | None) -> int | None:
    if certificate is None:
        connection = http.client.HTTPConnection(host, port, timeout=_PROBE_TIMEOUT_S)
    else:
        context = pinned_context(certificate)
        connection = http.client.HTTPSConnection(host, port, timeout=_PROBE_TIMEOUT_S, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def find_service_actor() -> ActorHandle[Any] | None:
    """The cluster's service actor, if a service runs there."""
    try:
        service_actor: ActorHandle[Any] = ray.get_actor(SERVICE_ACTOR_NAME, namespace=NAMESPACE)
    except ValueError:
        return None
    return service_actor
