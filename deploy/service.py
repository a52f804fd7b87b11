"""`run(config)`: start a service, keep it up until a signal, and shut it down.

Start: Ray, the service actor, Serve with the pools and the routers, then progress lines until the service is ready or
its deadline has passed. Shutdown: no new requests, running ones finish, nothing is left. A failed start prints one
message with the reason; the exit code is 1.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from tensorweave.cluster.cluster_resources import can_grow, read_cluster_resources
from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.kv_links import MAX_SOURCES
from tensorweave.cluster.process_sentinel import OwnSentinel
from tensorweave.cluster.ray_auth import refuse_open_ray
from tensorweave.cluster.ray_session import start_or_join_ray, will_start_ray
from tensorweave.cluster.sentences import essence, sentence_of
from tensorweave.deploy.actor_names import APP_NAME, HEAD_NODE, NAMESPACE, SERVICE_ACTOR_NAME
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.driver_log import driver_log, format_rays_own
from tensorweave.deploy.ingress import http_options, ingress_env, taken_ports
from tensorweave.deploy.monitor import RayCluster, RayLost, ServiceFailed, abandon_ray, monitor
from tensorweave.deploy.pinned_model import PinnedModel
from tensorweave.deploy.pools import explain_shortage, pool_specs, roomy_cpus
from tensorweave.deploy.progress import PoolReporter, report, report_links
from tensorweave.deploy.router_hosts import router_urls
from tensorweave.deploy.serve_app import build
from tensorweave.deploy.service_actor import DRAIN_SLACK_S, SERVE_SHUTDOWN_TIMEOUT_S, ServiceActor, find_service_actor
from tensorweave.deploy.stop_signal import StopSignal

_CONTROL_TIMEOUT_S: Final = 60.0
_ACTOR_START_TIMEOUT_S: Final = 180.0  # Ray starts its process first: more than a minute on a busy host
_PROGRESS_INTERVAL_S: Final = 0.25
_LINKS_TIMEOUT_S: Final = 5.0

_TakenPorts = Callable[[str, Sequence[int]], list[int]]
"""(host, ports) to those of them on which somebody listens."""


class StartFailed(TensorweaveError):
    """The service cannot start here; the message says why."""


class StoppedEarly(Exception):
    """A signal came before the service was ready."""


def run(config: ServeConfig, *on_ready: Callable[[str], None]) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP, then drain. Return the exit code. Call it from the main thread.

    Each of `on_ready` is called once, with the URL of the first router replica, when the service answers.
    """
    with driver_log(config.logging.settings()), StopSignal() as stop, ExitStack() as ending:
        try:
            model = PinnedModel.find(config)
            config = model.config
            urls, service_actor = _start(model, stop, ending)
        except (StartFailed, TensorweaveError, ValueError, OSError, RayError, RayServeException) as error:
            report(f"cannot start: {_sentence(error)}")
            return 1
        except StoppedEarly:
            report("stopped before it was ready")
            return 1
        report(f"ready: {config.model_name} at {urls[0]}/v1 (Serve's proxy at port {config.router.proxy_port})")
        if urls[1:]:
            report(f"more routers: {', '.join(urls[1:])}")
        report(_admin_line(config))
        for action in on_ready:
            action(urls[0])
        code = _keep_up(config, service_actor, stop, ending)
        ending.close()
        report("stopped")
    return code


@contextmanager
def running(config: ServeConfig) -> Iterator[str]:
    """A service for what this process does itself: its URL, once it answers. At the end of the context it has drained
    and is gone. Call it from the main thread.

    Raises:
        TensorweaveError, ValueError, OSError: It does not start.
        KeyboardInterrupt: A signal came before it was ready.
    """
    with driver_log(config.logging.settings()), ExitStack() as ending:
        try:
            with StopSignal() as stop:
                urls, _ = _start(PinnedModel.find(config), stop, ending)
        except (RayError, RayServeException) as error:
            raise StartFailed(_sentence(error)) from None
        except StoppedEarly:
            raise KeyboardInterrupt from None
        yield urls[0]


def _keep_up(config: ServeConfig, service_actor: ActorHandle[Any], stop: StopSignal, ending: ExitStack) -> int:
    """Return the exit code when the service has been asked to stop, or cannot go on."""
    try:
        monitor(RayCluster(service_actor), stop, config.limits.outage_timeout_s, PoolReporter())
    except ServiceFailed as failure:
        report(f"giving up: {failure}")
        return 1
    except RayLost as loss:
        report(f"giving up: {loss}")
        ending.pop_all()  # nothing is left to shut down in order, so its callbacks must not run
        if not abandon_ray():
            os._exit(1)
        return 1
    name = "asked to stop" if stop.received is None else stop.received.name
    report(f"{name}: finishing running requests (up to {config.limits.drain_timeout_s:g} s), then stopping")
    return 0


def _start(model: PinnedModel, stop: StopSignal, ending: ExitStack) -> tuple[list[str], ActorHandle[Any]]:
    """Start everything and wait until it is ready; `ending` undoes it. Return the routers' URLs and the service
    actor."""
    config = model.config
    deadline_s = time.monotonic() + config.limits.start_timeout_s
    if will_start_ray(config.ray.address):  # its head is this host, and to start it takes seconds
        _check_ports(config, taken_ports)
    _join_ray(config, ending)
    stop.arm()
    service_actor = _start_service_actor(config, ending)
    _check_ports(config, partial(_ports_taken_there, service_actor))
    _check_listener_files(config, service_actor)
    report(f"loading {config.shared_args.model}")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    env = ingress_env(config.router)
    serve.start(http_options=http_options(config.router), controller_options={"runtime_env": {"env_vars": env}})
    target = serve.RunTarget(build(model, replica_env=env), name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    _await_ready(config, service_actor, stop, deadline_s)
    report_links(_await_links(service_actor, stop))
    return router_urls(config.router), service_actor


def _join_ray(config: ServeConfig, ending: ExitStack) -> None:
    """Join or start a Ray cluster. Raises StartFailed if it cannot hold the pools, or if Serve already runs there."""
    report("joining Ray" if config.ray.address or os.environ.get("RAY_ADDRESS") else "starting Ray")
    num_cpus = roomy_cpus(config)
    session = ending.enter_context(start_or_join_ray(config.ray.address, num_cpus=num_cpus, namespace=NAMESPACE))
    format_rays_own(config.logging.settings())
    refuse_open_ray(is_allowed=config.security.allow_unauthenticated_ray)
    if session.is_private or (config.limits.place_timeout_s is None and not can_grow()):
        _check_room(config)
    if find_service_actor() is not None:
        raise StartFailed("a tensorweave service already runs on this Ray cluster; stop that one first")
    if serve.status().proxies:
        raise StartFailed(
            "Ray Serve already runs on this cluster, so the ports of the routers cannot be set; "
            "use another cluster, end it with `serve shutdown`, or deploy beside it with "
            "`serve run tensorweave.deploy.serve_app:build_app config=FILE.yaml`"
        )


def _check_room(config: ServeConfig) -> None:
    """Raises StartFailed if the cluster could not hold the pools even when idle: it gets no more nodes."""
    resources = read_cluster_resources()
    if shortage := explain_shortage(pool_specs(config, has_gpus=resources.total("GPU") > 0), resources):
        raise StartFailed(shortage)


def _start_service_actor(config: ServeConfig, ending: ExitStack) -> ActorHandle[Any]:
    """Start the service actor; `ending` makes it end the service."""
    drain_timeout_s = config.limits.drain_timeout_s
    sentinel = OwnSentinel()
    service_actor: ActorHandle[Any] = (
        ray.remote(ServiceActor)
        .options(
            name=SERVICE_ACTOR_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            resources=HEAD_NODE,
        )
        .remote(drain_timeout_s, sentinel.name, config.logging.settings())
    )
    ending.callback(_end_service, service_actor, sentinel, drain_timeout_s)
    return service_actor


def _end_service(service_actor: ActorHandle[Any], sentinel: OwnSentinel, drain_timeout_s: float) -> None:
    try:
        ray.get(service_actor.end.remote(), timeout=drain_timeout_s + DRAIN_SLACK_S + SERVE_SHUTDOWN_TIMEOUT_S)
    except RayError as error:
        report(f"the service could not be shut down cleanly: {_sentence(error)}")
    except KeyboardInterrupt:
        report("not waiting any longer; on a cluster that stays, the service ends once its requests have")
        raise  # the service actor continues without this process
    ray.kill(service_actor)
    sentinel.end()


def _admin_line(config: ServeConfig) -> str:
    where = f"{config.admin.scheme}://{config.admin.reachable_host}:{config.admin_port}"
    security = config.security
    if security.api_keys and not security.admin_keys:
        return f"status page at {where}, which nobody may use: set security.admin_keys"
    return f"status page at {where}" + (" (the password is an admin key)" if security.admin_keys else "")


def _ports_taken_there(service_actor: ActorHandle[Any], host: str, ports: Sequence[int]) -> list[int]:
    """On the node of the service actor, where the routers will listen."""
    try:
        taken: list[int] = ray.get(service_actor.taken_ports.remote(host, ports), timeout=_ACTOR_START_TIMEOUT_S)
    except GetTimeoutError:  # an OSError too
        raise StartFailed(f"the service actor has not answered for {_ACTOR_START_TIMEOUT_S:g} s") from None
    return taken


def _check_ports(config: ServeConfig, taken_of: _TakenPorts) -> None:
    router = config.router
    ports = [*range(router.port, router.port + router.replicas), router.proxy_port]
    _check_free("router", router.host, ports, "router.port and router.proxy_port", taken_of)
    _check_free("admin", config.admin.host, [config.admin_port], "admin.port", taken_of)


def _check_listener_files(config: ServeConfig, service_actor: ActorHandle[Any]) -> None:
    """Raises StartFailed if the head lacks what HTTPS needs."""
    for table, tls in (("router", config.router.tls), ("admin", config.admin.tls)):
        if tls is not None:
            asked = service_actor.why_no_https.remote(f"{table}.tls", tls.certificate, tls.key)
            if (why := ray.get(asked, timeout=_ACTOR_START_TIMEOUT_S)) is not None:
                raise StartFailed(why)


def _check_free(table: str, host: str, ports: Sequence[int], names: str, taken_of: _TakenPorts) -> None:
    """Raises StartFailed if `ports` cannot be listened on; `names` are the keys that choose them."""
    try:
        taken = taken_of(host, ports)
    except OSError as error:
        raise StartFailed(f"{table}.host {host!r} cannot be listened on: {_sentence(error)}") from None
    if taken:
        raise StartFailed(f"port {', '.join(map(str, taken))} of {host} is taken; choose {names} anew")


def _await_ready(config: ServeConfig, service_actor: ActorHandle[Any], stop: StopSignal, deadline_s: float) -> None:
    """Wait until router and proxy report the service as ready, and every pool has a gang or is known to have failed.
    Report changes of the pools meanwhile."""
    reporter, router = PoolReporter(), config.router
    certificate = None if router.tls is None else router.tls.certificate
    while True:
        _raise_failures()
        pools = ray.get(service_actor.describe_pools.remote(), timeout=_CONTROL_TIMEOUT_S) or []
        for pool in pools:
            if pool["failure"]:
                raise StartFailed(f"pool {pool['pool']}: {pool['failure']}")
        reporter(pools)
        probes = [
            service_actor.probe.remote(router.reachable_host, port, "/ready", certificate)
            for port in (router.port, router.proxy_port)
        ]
        are_ready = ray.get(probes, timeout=_CONTROL_TIMEOUT_S) == [200, 200]
        if are_ready and not any(_is_starting(pool) for pool in pools):
            return
        if time.monotonic() > deadline_s:
            raise StartFailed(
                f"not ready within {config.limits.start_timeout_s:g} s (limits.start_timeout_s): {reporter.last_line}"
            )
        if stop.wait(_PROGRESS_INTERVAL_S):
            raise StoppedEarly


def _await_links(service_actor: ActorHandle[Any], stop: StopSignal) -> list[dict[str, Any]]:
    """Wait a few seconds until the links are measured. Return the pools, measured or not."""
    give_up_s = time.monotonic() + _LINKS_TIMEOUT_S
    while True:
        pools: list[dict[str, Any]] = ray.get(service_actor.describe_pools.remote(), timeout=_CONTROL_TIMEOUT_S) or []
        ready = [(pool["role"], gang) for pool in pools for gang in pool["gangs"] if gang["state"] == "ready"]
        num_prefill = sum(role == "prefill" for role, _ in ready)
        if all(
            len(gang.get("kv_links", {})) >= min(num_prefill, MAX_SOURCES) for role, gang in ready if role == "decode"
        ):
            return pools
        if time.monotonic() > give_up_s or stop.wait(_PROGRESS_INTERVAL_S):
            return pools


def _raise_failures() -> None:
    app = serve.status().applications.get(APP_NAME)
    if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
        raise StartFailed(" ".join(dict.fromkeys(essence(message) for message in messages if message)))


def _is_starting(pool: dict[str, Any]) -> bool:
    """Whether the pool's first gang is being started, without a failure so far. A pool that has a gang is not waited
    for, nor is one that has failed: the service can do without it for a while."""
    states = [gang["state"] for gang in pool["gangs"]]
    return "ready" not in states and any(gang["state"] == "starting" and not gang["reason"] for gang in pool["gangs"])


def _sentence(error: Exception) -> str:
    """The reason, for an error of this process or of an actor, without a traceback."""
    if isinstance(error, StartFailed):
        return str(error)
    return sentence_of(error.cause if isinstance(error, RayTaskError) else error)
