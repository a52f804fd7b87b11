"""The Ray Serve application: `Pools`, which owns the gangs, and `Router` replicas, which listen for clients.

`build` makes it for `deploy/service.py`; `build_app` for Serve's own commands:
`serve run tensorweave.deploy.serve_app:build_app config=service.yaml limits.max_queued=10`.
Gangs are children of the `Pools` replica, so they end with the application, whoever takes it down.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, Final

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from tensorweave.cluster.fleet import WatchedFleet
from tensorweave.cluster.ray_auth import refuse_open_ray
from tensorweave.cluster.supervisor import start_supervisor
from tensorweave.deploy.config import ServeConfig, load_config
from tensorweave.deploy.guardian import HEAD_NODE, POOLS_NAME
from tensorweave.deploy.ingress import let_replacement_rebind, mark_made_up_ids
from tensorweave.deploy.pools import pool_specs
from tensorweave.deploy.serve_logging import log_through_serve
from tensorweave.deploy.served_model import ServedModel
from tensorweave.workers.model_store import resolve_model
from tensorweave.workers.rank import RankWorker

if TYPE_CHECKING:
    from fastapi import FastAPI

_CONTROL_TIMEOUT_S: Final = 30.0
# Beyond what the router's own admission holds, so that refusals come from it, in OpenAI's shape.
_SERVE_SLACK: Final = 1024


class Pools:
    """Owns the supervisor of the gangs. When this replica dies, so do they, and Serve makes new ones."""

    def __init__(self, plain: dict[str, Any], digests: dict[str, str]) -> None:
        log_through_serve()
        config = ServeConfig.from_plain(plain)
        refuse_open_ray(is_allowed=config.security.allow_unauthenticated_ray)
        self._drain_timeout_s = config.limits.drain_timeout_s
        specs = pool_specs(config, has_gpus=ray.cluster_resources().get("GPU", 0) > 0, digests=digests)
        self._supervisor: ActorHandle[Any] = start_supervisor(specs, RankWorker)

    def supervisor(self) -> ActorHandle[Any]:
        return self._supervisor

    async def describe(self) -> list[dict[str, Any]]:
        pools: list[dict[str, Any]] = await self._supervisor.describe.remote()
        return pools

    async def drain(self, timeout_s: float) -> None:
        """No new requests; those that run get `timeout_s` to finish; then the gangs end."""
        await self._supervisor.drain.remote(timeout_s)

    async def scale(self, pool: str, replicas: int) -> None:
        """That many gangs in this pool; those that go finish their requests first, within limits.drain_timeout_s."""
        await self._supervisor.scale.remote(pool, replicas, self._drain_timeout_s)

    async def check_health(self) -> None:
        """A supervisor that Ray has given up on raises here, and Serve replaces this replica."""
        async with asyncio.timeout(_CONTROL_TIMEOUT_S):
            await self._supervisor.describe.remote()


class Router:
    """One HTTP front end.

    Healthy while its event loop turns and it follows the pools; whether they serve is for `/health` to say, and
    replacing a router would not help.
    """

    def __init__(self, plain: dict[str, Any], pools: DeploymentHandle) -> None:
        self._config = ServeConfig.from_plain(plain)
        self._pools = pools

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once, before it listens. Imports here: launching this class takes no fastapi."""
        from tensorweave.router.app import build_app
        from tensorweave.router.connections import bound_connections
        from tensorweave.router.dispatch import Dispatcher
        from tensorweave.router.policy import PolicySettings, build_policy
        from tensorweave.router.service import RouterService
        from tensorweave.router.tokens import Tokenizer

        log_through_serve()
        let_replacement_rebind()
        bound_connections()
        config, args = self._config, self._config.shared_args
        model = await asyncio.to_thread(resolve_model, config.model, revision=args.revision)
        tokenizer = await asyncio.to_thread(
            Tokenizer.load,
            args.tokenizer or model,
            tokenizer_mode=args.tokenizer_mode,
            revision=args.tokenizer_revision or args.revision,
            trust_remote_code=args.trust_remote_code,
        )
        async with asyncio.timeout(_CONTROL_TIMEOUT_S):
            supervisor = await self._pools.supervisor.remote()
        fleet, limits = WatchedFleet(supervisor), config.limits.router_limits()
        policy = build_policy(config.router.policy, PolicySettings(min_prefill_tokens=config.router.min_prefill_tokens))
        dispatcher = Dispatcher(fleet, policy, limits)
        version: str = sys.modules["tensorweave"].__version__  # the front door itself is not ours to import
        service = RouterService(
            config.model_name,
            tokenizer,
            dispatcher,
            fleet,
            version,
            limits,
            accepts_phases=config.security.enable_disaggregated_params,
            key_digests=config.security.api_keys,
            other_names=config.model_names[1:],
            cors_origins=config.security.cors_origins,
        )
        # Serve answers with the id that a request came with, at both doors, and makes one up where there is none.
        return build_app(service, server_echoes_ids=True, made_up_ids=mark_made_up_ids())


def build(served: ServedModel, replica_env: dict[str, str] | None = None) -> Application:
    """The application for a configuration whose model every host finds by its name, or under the same path.

    `replica_env` goes to the router replicas; Serve's controller must have been started with it too.
    """
    config, plain = served.config, served.config.to_plain()
    router_options: dict[str, Any] = {"num_cpus": 0, "resources": HEAD_NODE}
    if replica_env:
        router_options["runtime_env"] = {"env_vars": replica_env}
    pools = serve.deployment(
        Pools,
        name=POOLS_NAME,
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=5.0,
        health_check_timeout_s=_CONTROL_TIMEOUT_S,
        ray_actor_options={"num_cpus": 0, "resources": HEAD_NODE},
    )
    router = serve.deployment(
        serve.ingress()(Router),
        name="Router",
        num_replicas=config.router.replicas,
        max_ongoing_requests=config.limits.max_inflight + config.limits.max_queued + _SERVE_SLACK,
        graceful_shutdown_timeout_s=config.limits.drain_timeout_s + 5.0,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1.0,
        health_check_timeout_s=_CONTROL_TIMEOUT_S,
        ray_actor_options=router_options,
        logging_config={"enable_access_log": False},
    )
    return router.bind(plain, pools.bind(plain, served.digests))


def build_app(args: dict[str, str]) -> Application:
    """Serve's builder: `config` names the YAML file, every other argument is an override (`limits.max_queued=10`)."""
    path = args.get("config")
    if path is None:
        raise ValueError("say which service to build: config=FILE.yaml")
    config = load_config(path, [f"{key}={value}" for key, value in args.items() if key != "config"])
    return build(ServedModel.find(config))
