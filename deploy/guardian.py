"""The service's last hand: a detached actor that drains and takes the service down when its driver asks, or when its
driver is gone.

Serve outlives the process that deployed it, so a driver that is killed (`ray job stop` does so after 3 s) would leave
it running. The guardian also is the mark that a cluster carries a service: there is at most one.

    driver ──end()──────▶ guardian ──▶ gangs finish their requests, take no new ones ──▶ serve.shutdown()
       └─its Anchor dies──▶┘
"""

from __future__ import annotations

import asyncio
import http.client
import logging
from collections.abc import Sequence
from typing import Any, Final

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from tensorweave.deploy.ingress import taken_ports

logger = logging.getLogger(__name__)

APP_NAME: Final = "tensorweave"
POOLS_NAME: Final = "Pools"
GUARDIAN_NAME: Final = "tensorweave-guardian"
NAMESPACE: Final = "tensorweave"
HEAD_NODE: Final = {"node:__internal_head__": 0.001}
DRAIN_SLACK_S: Final = 15.0
SERVE_SHUTDOWN_TIMEOUT_S: Final = 60.0
_PROBE_TIMEOUT_S: Final = 3.0


class NoPools(Exception):
    """There is nothing to ask or to drain yet."""


class Anchor:
    """An actor that lives exactly as long as the driver that made it."""

    async def hold(self) -> None:
        await asyncio.Event().wait()


class Guardian:
    """An actor on the head node, beside the routers. `drain_timeout_s` is what running requests get to finish."""

    def __init__(self, drain_timeout_s: float) -> None:
        self._drain_timeout_s = drain_timeout_s
        self._handle: DeploymentHandle | None = None
        self._ending: asyncio.Task[None] | None = None
        logging.getLogger("ray.serve").setLevel(logging.ERROR)

    def taken_ports(self, host: str, ports: Sequence[int]) -> list[int]:
        return taken_ports(host, ports)

    async def probe(self, host: str, port: int, path: str) -> int | None:
        """The status of a GET on this node; None when nobody answers."""
        return await asyncio.to_thread(_get_status, host, port, path)

    async def describe_pools(self) -> list[dict[str, Any]] | None:
        """What the supervisor tells of its pools; None while there is none."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                pools: list[dict[str, Any]] = await self._pools().describe.remote()
        except (NoPools, RayError, RayServeException, TimeoutError):
            return None
        return pools

    def _pools(self) -> DeploymentHandle:
        if self._handle is None:
            try:
                self._handle = serve.get_deployment_handle(POOLS_NAME, APP_NAME)
            except (RayServeException, KeyError):
                raise NoPools("Serve has not deployed the pools") from None
        return self._handle

    async def guard(self, driver_life: Sequence[Any]) -> None:
        """`driver_life` holds one reference that ends with the driver (bare, Ray would wait for it before the call)."""
        try:
            await driver_life[0]
        except RayError as error:
            logger.warning("the driver is gone (%s): taking the service down", type(error).__name__)
        await self.end()
        ray.actor.exit_actor()

    async def end(self) -> None:
        """Drain, then take Serve and with it the gangs down. Calling it again waits for the same end."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        pools = await self.describe_pools()
        is_unknown = pools is None  # slow to answer: requests may be running all the same
        if is_unknown or any(gang["state"] == "ready" for pool in pools or () for gang in pool["gangs"]):
            try:
                async with asyncio.timeout(self._drain_timeout_s + DRAIN_SLACK_S):
                    await self._pools().drain.remote(self._drain_timeout_s)
            except NoPools:
                pass
            except (RayError, RayServeException, TimeoutError) as error:
                logger.warning("draining was cut short: %s: %s", type(error).__name__, error)
        async with asyncio.timeout(SERVE_SHUTDOWN_TIMEOUT_S):
            await serve.shutdown_async()


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
