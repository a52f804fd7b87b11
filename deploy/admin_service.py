"""`start_admin_port`: the admin port of a service, in the process that keeps its pools."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final

from ray.actor import ActorHandle
from ray.exceptions import RayError
from starlette.types import ASGIApp

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.tls import pinned_context
from tensorweave.deploy.adapter_control import SupervisorAdapters
from tensorweave.deploy.admin_port import AdminPort
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.controller import Controller
from tensorweave.deploy.pool_control import ServicePools
from tensorweave.router.admin.access import AdminKeys
from tensorweave.router.admin.adapters import adapter_routes
from tensorweave.router.admin.app import AdminService, build_admin_app
from tensorweave.router.admin.chat import ChatRelay
from tensorweave.router.admin.observer import Observer
from tensorweave.router.admin.pools import pool_routes
from tensorweave.router.admin.router_table import RouterTable

_DESCRIBE_TIMEOUT_S: Final = 5.0


def start_admin_port(
    config: ServeConfig,
    version: str,
    find_supervisor: Callable[[], ActorHandle[Any]],
    routers: RouterTable,
    chat_key: str | None,
    control: ServicePools,
    controller: Controller,
) -> None:
    """`find_supervisor` blocks, and raises ValueError if there is none. `chat_key`: an API key for the page's chat."""

    async def describe() -> Sequence[dict[str, Any]]:
        pools = await _describe(find_supervisor)
        for pool in pools:
            pool["pressure"], pool["pressure_reason"] = controller.pressures.get(pool["pool"], (None, None))
        return pools

    def build() -> ASGIApp:
        security = config.security
        return build_admin_app(
            AdminService(
                model_name=config.model_name,
                version=version,
                keys=AdminKeys(security.admin_keys, bool(security.api_keys), config.admin.host),
                observer=Observer(describe, routers),
                chat=ChatRelay(config.endpoint, chat_key, verify=_trust_in_endpoint(config)),
                heartbeat_limit_s=config.limits.router_limits().heartbeat_limit_s,
                routes=[
                    *adapter_routes(SupervisorAdapters(find_supervisor), config.model_names),
                    *pool_routes(control),
                ],
            )
        )

    AdminPort(config.admin.host, config.admin_port, build, config.admin.tls).start()


def _trust_in_endpoint(config: ServeConfig) -> ssl.SSLContext | bool:
    """Our own endpoint is known by its very certificate, another one by the system's authorities."""
    if config.admin.endpoint is None and config.router.tls is not None:
        return pinned_context(config.router.tls.certificate)
    return True


async def _describe(find_supervisor: Callable[[], ActorHandle[Any]]) -> Sequence[dict[str, Any]]:
    """Raises NotReady."""
    try:
        async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
            supervisor = await asyncio.to_thread(find_supervisor)
            pools: list[dict[str, Any]] = await supervisor.describe.remote()
    except (ValueError, TimeoutError, RayError) as error:
        raise NotReady(f"the supervisor does not answer: {type(error).__name__}") from error
    return pools
