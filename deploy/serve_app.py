"""The Ray Serve application: `Pools`, which keeps a supervisor of the gangs alive and listens for operators, and
`Router` replicas, which listen for clients.

`build` makes it for `deploy/service.py`, `build_app` for Serve's own commands:
`serve run tensorweave.deploy.serve_app:build_app config=service.yaml limits.max_queued=10`.
The supervisor ends its gangs and itself a minute after the application has gone, however it was shut down.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from ray import serve
from ray.actor import ActorHandle
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from tensorweave.cluster.fleet import WatchedFleet
from tensorweave.cluster.ray_auth import refuse_open_ray
from tensorweave.cluster.ray_internals import allow_rebinding, mark_generated_ids
from tensorweave.cluster.ray_session import cluster_has_gpus
from tensorweave.cluster.router_report import RouterReport
from tensorweave.cluster.supervisor_handle import find_supervisor
from tensorweave.cluster.supervisor_start import find_or_start_supervisor
from tensorweave.deploy.actor_names import HEAD_NODE, supervisor_home
from tensorweave.deploy.api_keys import digest_of
from tensorweave.deploy.config import ServeConfig, load_config
from tensorweave.deploy.config_source import ConfigSource
from tensorweave.deploy.controller import Controller
from tensorweave.deploy.deployment import Deployment
from tensorweave.deploy.pinned_model import PinnedModel
from tensorweave.deploy.pool_control import CurrentDeployment, ServicePools
from tensorweave.deploy.router_hosts import replica_options
from tensorweave.deploy.router_reports import report_for_ever
from tensorweave.deploy.serve_logging import log_in_replica
from tensorweave.router.admin.router_table import RouterTable
from tensorweave.workers.rank import RankWorker
from tensorweave.workers.store.model_store import resolve_model

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tensorweave.router.http.request_record import Recorder
    from tensorweave.router.text.tokens import Tokenizer

_CONTROL_TIMEOUT_S: Final = 30.0
# More than the router's own admission holds, so that the router refuses requests, in OpenAI's form, and not Serve.
_SERVE_SLACK: Final = 1024


class Pools:
    """Keeps a supervisor of the application's gangs alive, with the pools of this configuration, and the admin port.

    The supervisor outlives this replica, so Serve may replace the replica without effect on requests. `generation`
    tells which of two replicas is from the later deployment. `chat_key` is an API key for the admin page's chat.
    """

    def __init__(
        self,
        plain: dict[str, Any],
        digests: dict[str, str],
        generation: int,
        source: ConfigSource | None = None,
        chat_key: str | None = None,
    ) -> None:
        from tensorweave.deploy.admin_service import start_admin_port

        config = _without_key(ServeConfig.from_plain(plain), chat_key)
        log_in_replica(config.logging.settings(), "pools")
        refuse_open_ray(is_allowed=config.security.allow_unauthenticated_ray)
        self._source = source
        model = PinnedModel(config, digests)
        self._current = CurrentDeployment(Deployment.of(model, generation, has_gpus=cluster_has_gpus()))
        self._home = supervisor_home(serve.get_replica_context().app_name)
        self._log = config.logging.settings()
        self._routers = RouterTable()
        find = functools.partial(find_supervisor, self._home)
        control, controller = ServicePools(find, self._current), Controller(find, self._routers, self._current)
        start_admin_port(config, _version(), find, self._routers, chat_key, control, controller)
        self._controlling = asyncio.create_task(controller.run())

    def note_router(self, report: RouterReport) -> float:
        """Return when this router is to report again, in seconds from now."""
        return self._routers.note(report)

    def supervisor(self) -> ActorHandle[Any]:
        current = self._current.value
        return find_or_start_supervisor(self._home, current.specs, RankWorker, self._log, current.config.adapters)

    async def check_health(self) -> None:
        """Replace a supervisor that has ended; give one of an earlier deployment this configuration."""
        async with asyncio.timeout(_CONTROL_TIMEOUT_S):
            supervisor = await asyncio.to_thread(self.supervisor)
            notice = None if self._source is None else await asyncio.to_thread(self._source.notice)
            own = self._current.value
            plan = await own.apply(supervisor, notice)
            if plan.generation > own.generation and plan.config and self._current.value is own:
                self._current.value = own.resumed(plan.generation, plan.config, plan.specs)


class Router:
    """One HTTP front end.

    It is healthy while its event loop runs. Whether the pools serve is reported by `/health`: replacing a router would
    not help.
    """

    def __init__(self, plain: dict[str, Any], pools: DeploymentHandle) -> None:
        self._config = ServeConfig.from_plain(plain)
        self._pools = pools

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once, before it listens. The imports are here because deploying this class needs no
        fastapi."""
        from tensorweave.router.chat.settings import ChatSettings
        from tensorweave.router.dispatch.dispatch import Dispatcher
        from tensorweave.router.dispatch.policy import PolicySettings, build_policy
        from tensorweave.router.garbage_collection import spare_collections
        from tensorweave.router.http.app import build_app
        from tensorweave.router.http.connections import bound_connections
        from tensorweave.router.http.keys import key_name
        from tensorweave.router.http.metrics import RouterMetrics
        from tensorweave.router.service import RouterService
        from tensorweave.router.text.event_pace import EventPace

        replica = serve.get_replica_context().replica_id.unique_id
        log_in_replica(self._config.logging.settings(), f"router {replica}")
        allow_rebinding()
        bound_connections()
        if (tls := self._config.network.tls_files()) is not None:
            tls.connecting()  # refuse here what each connection to a gang would
        config, tokenizer, fleet = self._config, await self._load_tokenizer(), await self._find_fleet()
        weights = {key_name(digest): weight for digest, weight in config.security.key_weights.items()}
        limits = config.limits.router_limits(weights)
        settings = PolicySettings(
            min_prefill_tokens=config.router.min_prefill_tokens,
            ttft_limit_s=_seconds(config.router.ttft_limit_ms),
            itl_limit_s=_seconds(config.router.itl_limit_ms),
        )
        policy = build_policy(config.router.policy, settings)
        dispatcher = Dispatcher(fleet, policy, limits)
        service = RouterService(
            config.model_name,
            tokenizer,
            dispatcher,
            fleet,
            _version(),
            limits,
            accepts_phases=config.security.enable_disaggregated_params,
            key_digests=config.security.api_keys,
            other_names=config.model_names[1:],
            cors_origins=config.security.cors_origins,
            guided=config.limits.guided_limits(),
            roles=frozenset(pool.role for pool in config.pools.values()),
            recorders=_recorders(config, replica),
            pace=EventPace(config.router.max_events_per_s),
            chat=ChatSettings(
                config.shared_args.tool_parser,
                config.shared_args.reasoning_parser,
                config.security.enable_request_chat_template,
            ),
        )
        spare_collections()
        metrics = RouterMetrics(config.model_name, dispatcher)
        read = functools.partial(metrics.report, replica)
        self._reporting = asyncio.create_task(report_for_ever(read, self._pools.note_router.remote))
        # Serve, as well as its proxy, answers with the request's own id and generates one for a request without.
        return build_app(service, metrics=metrics, server_echoes_ids=True, generated_id_prefix=mark_generated_ids())

    async def _load_tokenizer(self) -> Tokenizer:
        from tensorweave.cluster.without_torch import hide_torch_from_transformers
        from tensorweave.router.text.tokens import Tokenizer

        args = self._config.shared_args
        if not args.trust_remote_code:  # a model's own code may want all of transformers
            hide_torch_from_transformers()
        model = await asyncio.to_thread(resolve_model, self._config.model, revision=args.revision)
        return await asyncio.to_thread(
            Tokenizer.load,
            args.tokenizer or model,
            tokenizer_mode=args.tokenizer_mode,
            revision=args.tokenizer_revision or args.revision,
            trust_remote_code=args.trust_remote_code,
        )

    async def _find_fleet(self) -> WatchedFleet:
        async with asyncio.timeout(_CONTROL_TIMEOUT_S):
            supervisor = await self._pools.supervisor.remote()
        home = supervisor_home(serve.get_replica_context().app_name)
        return WatchedFleet(supervisor, functools.partial(find_supervisor, home))


def _without_key(config: ServeConfig, chat_key: str | None) -> ServeConfig:
    """As the operator wrote it: without the page's own API key."""
    if chat_key is None:
        return config
    keys = [key for key in config.security.api_keys if key != digest_of(chat_key)]
    return config.model_copy(update={"security": config.security.model_copy(update={"api_keys": keys})})


def _recorders(config: ServeConfig, replica: str) -> list[Recorder]:
    """The recorders that the configuration asks for."""
    from tensorweave.router.http.request_log import RequestLog

    recorders: list[Recorder] = []
    if config.logging.requests:
        recorders.append(RequestLog())
    if config.tracing.endpoint is not None:
        from tensorweave.router.http.tracing import otlp_tracing

        tracing = config.tracing
        recorders.append(otlp_tracing(config.tracing.endpoint, tracing.share, tracing.service_name, replica))
    return recorders


def _version() -> str:
    version: str = sys.modules["tensorweave"].__version__  # this room may not import the package itself
    return version


def build(
    model: PinnedModel, replica_env: dict[str, str] | None = None, source: ConfigSource | None = None
) -> Application:
    """The application for a model that every host can find by its name, or under the same path.

    `replica_env` is for the router replicas; Serve's controller must have been started with it too.
    """
    config, plain = model.config, model.config.to_plain()
    chat_key = None
    if config.security.api_keys:
        chat_key = secrets.token_hex(32)
        plain["security"]["api_keys"].append(digest_of(chat_key))
    options = replica_options(config.router)
    if replica_env:
        options["ray_actor_options"]["runtime_env"] = {"env_vars": replica_env}
    pools = serve.deployment(
        Pools,
        name="Pools",
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
        max_ongoing_requests=config.limits.max_inflight + config.limits.max_queued + _SERVE_SLACK,
        graceful_shutdown_timeout_s=config.limits.drain_timeout_s + 5.0,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1.0,
        health_check_timeout_s=_CONTROL_TIMEOUT_S,
        logging_config={"enable_access_log": False},
        **options,
    )
    return router.bind(plain, pools.bind(plain, model.digests, time.time_ns(), source, chat_key))


def build_app(args: dict[str, Any]) -> Application:
    """Serve's builder: `config` names the YAML file, every other argument is an override (`limits.max_queued=10`).

    `serve deploy` builds again, and so applies a changed file, only if its arguments have changed: `revision`, which
    may be anything, serves that purpose.
    """
    path = args.get("config")
    if path is None:
        raise ValueError("the argument config=FILE.yaml is missing: it names the service to build")
    config = load_config(path, [f"{key}={value}" for key, value in args.items() if key not in ("config", "revision")])
    source = ConfigSource.read(path)
    return build(PinnedModel.find(config), source=source)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
