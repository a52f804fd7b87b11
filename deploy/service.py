"""`run(config)`: from a configuration to a running service, and back to nothing.

Ray, the guardian, Serve with the pools and the routers, readiness with progress lines and a deadline; then up until a
signal; then down: no new work, running requests finish, nothing stays behind. A start that fails says why in one
message; the exit code is 1.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.ray_auth import refuse_open_ray
from tensorweave.cluster.ray_noise import without_noise
from tensorweave.cluster.ray_session import start_or_join_ray
from tensorweave.cluster.roads import SLOW_BYTES_PER_S
from tensorweave.cluster.sentences import essence, sentence_of
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.guardian import (
    APP_NAME,
    DRAIN_SLACK_S,
    GUARDIAN_NAME,
    HEAD_NODE,
    NAMESPACE,
    SERVE_SHUTDOWN_TIMEOUT_S,
    Anchor,
    Guardian,
    find_guardian,
)
from tensorweave.deploy.ingress import ingress_env
from tensorweave.deploy.pools import explain_shortage, needed_resources, pool_specs
from tensorweave.deploy.serve_app import build
from tensorweave.deploy.served_model import ServedModel
from tensorweave.deploy.stop_signal import StopSignal

_CONTROL_TIMEOUT_S: Final = 60.0
_PROGRESS_INTERVAL_S: Final = 0.25
_ROADS_TIMEOUT_S: Final = 5.0


class StartFailed(Exception):
    """The service cannot start here; the message says why."""


class StoppedEarly(Exception):
    """A signal came before the service was ready."""


def say(line: str) -> None:
    print(f"tensorweave: {line}", file=sys.stderr, flush=True)


def run(config: ServeConfig, on_ready: Callable[[str], None] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP, then drain; returns the exit code. Call it from the main thread.

    `on_ready` is called once, with the front door's URL, when the service answers.
    """
    with StopSignal() as stop, ExitStack() as ending:
        try:
            served = ServedModel.find(config)
            config = served.config
            url = _start(served, stop, ending)
        except (StartFailed, TensorweaveError, ValueError, OSError, RayError, RayServeException) as error:
            say(f"cannot start: {_sentence(error)}")
            return 1
        except StoppedEarly:
            say("stopped before it was ready")
            return 1
        say(f"ready: {config.model_name} at {url}/v1 (Serve's proxy at port {config.router.proxy_port})")
        if on_ready is not None:
            on_ready(url)
        stop.wait()
        name = "asked to stop" if stop.received is None else stop.received.name
        say(f"{name}: finishing running requests (up to {config.limits.drain_timeout_s:g} s), then stopping")
    say("stopped")
    return 0


def _start(served: ServedModel, stop: StopSignal, ending: ExitStack) -> str:
    """Everything up to readiness; what must be undone goes on `ending`. Returns the URL."""
    config = served.config
    deadline_s = time.monotonic() + config.limits.start_timeout_s
    ending.enter_context(_ray(config))
    stop.arm()
    guardian = ending.enter_context(_guardian(config))
    _check_ports(config, guardian)
    say(f"loading {config.shared_args.model}")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    env = ingress_env(config.router)
    http_options = {"host": config.router.host, "port": config.router.proxy_port}
    serve.start(http_options=http_options, controller_options={"runtime_env": {"env_vars": env}})
    target = serve.RunTarget(build(served, replica_env=env), name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    _await_ready(config, guardian, stop, deadline_s)
    _say_roads(_await_roads(guardian, stop))
    return f"http://{config.router.reachable_host}:{config.router.port}"


@contextmanager
def _ray(config: ServeConfig) -> Iterator[None]:
    """A Ray cluster that can hold the pools and carries no Serve of somebody else's."""
    say("joining Ray" if config.ray.address or os.environ.get("RAY_ADDRESS") else "starting Ray")
    need = needed_resources(pool_specs(config, has_gpus=False))
    num_cpus = need.get("CPU", 1.0)
    with without_noise(), start_or_join_ray(config.ray.address, num_cpus=num_cpus, namespace=NAMESPACE):
        refuse_open_ray(is_allowed=config.security.allow_unauthenticated_ray)
        total = ray.cluster_resources()
        if shortage := explain_shortage(pool_specs(config, has_gpus=total.get("GPU", 0) > 0), total):
            raise StartFailed(shortage)
        if find_guardian() is not None:
            raise StartFailed("this Ray cluster already carries a tensorweave service; stop that one first")
        if serve.status().proxies:
            raise StartFailed(
                "Ray Serve already runs on this cluster, so the front door's port cannot be set; "
                "use another cluster, end it with `serve shutdown`, or deploy beside it with "
                "`serve run tensorweave.deploy.serve_app:build_app config=FILE.yaml`"
            )
        yield


@contextmanager
def _guardian(config: ServeConfig) -> Iterator[ActorHandle[Any]]:
    """The guardian, from its post to the end of the service, which it brings about."""
    drain_timeout_s = config.limits.drain_timeout_s
    guardian: ActorHandle[Any] = (
        ray.remote(Guardian)
        .options(name=GUARDIAN_NAME, lifetime="detached", num_cpus=0, max_restarts=0, resources=HEAD_NODE)
        .remote(drain_timeout_s)
    )
    anchor: ActorHandle[Any] = ray.remote(Anchor).options(num_cpus=0).remote()
    guarding = guardian.guard.remote([anchor.hold.remote()])
    try:
        yield guardian
    finally:
        try:
            ray.get(guardian.end.remote(), timeout=drain_timeout_s + DRAIN_SLACK_S + SERVE_SHUTDOWN_TIMEOUT_S)
        except RayError as error:
            say(f"could not be taken down cleanly: {_sentence(error)}")
        except KeyboardInterrupt:
            say("not waiting any longer; on a cluster that stays, the service ends once its requests have")
            raise  # and the guardian goes on without us
        ray.kill(guardian)
        del guarding


def _check_ports(config: ServeConfig, guardian: ActorHandle[Any]) -> None:
    router = config.router
    ports = [*range(router.port, router.port + router.replicas), router.proxy_port]
    try:
        taken = ray.get(guardian.taken_ports.remote(router.host, ports), timeout=_CONTROL_TIMEOUT_S)
    except OSError as error:
        raise StartFailed(f"router.host {router.host!r} cannot be listened on: {_sentence(error)}") from None
    if taken:
        numbers = ", ".join(map(str, taken))
        raise StartFailed(f"port {numbers} of {router.host} is taken; choose router.port and router.proxy_port anew")


def _await_ready(config: ServeConfig, guardian: ActorHandle[Any], stop: StopSignal, deadline_s: float) -> None:
    """Until both doors say that the service is ready, and every pool has a gang or is in trouble. Tells each change of
    the pools."""
    told, router = "", config.router
    while True:
        _raise_failures()
        pools = ray.get(guardian.describe_pools.remote(), timeout=_CONTROL_TIMEOUT_S) or []
        for pool in pools:
            if pool["failure"]:
                raise StartFailed(f"pool {pool['pool']}: {pool['failure']}")
        line = "; ".join(_pool_line(pool) for pool in pools)
        if line and line != told:
            say(line)
            told = line
        doors = [
            guardian.probe.remote(router.reachable_host, port, "/ready") for port in (router.port, router.proxy_port)
        ]
        are_open = ray.get(doors, timeout=_CONTROL_TIMEOUT_S) == [200, 200]
        if are_open and not any(_is_coming_up(pool) for pool in pools):
            return
        if time.monotonic() > deadline_s:
            raise StartFailed(f"not ready within {config.limits.start_timeout_s:g} s (limits.start_timeout_s): {line}")
        if stop.wait(_PROGRESS_INTERVAL_S):
            raise StoppedEarly


def _await_roads(guardian: ActorHandle[Any], stop: StopSignal) -> list[dict[str, Any]]:
    """The pools with every pair measured, or as they are after a few seconds: nothing waits for a measurement."""
    give_up_s = time.monotonic() + _ROADS_TIMEOUT_S
    while True:
        pools: list[dict[str, Any]] = ray.get(guardian.describe_pools.remote(), timeout=_CONTROL_TIMEOUT_S) or []
        ready = [(pool["role"], gang) for pool in pools for gang in pool["gangs"] if gang["state"] == "ready"]
        num_prefill = sum(role == "prefill" for role, _ in ready)
        if all(len(gang.get("kv_roads", {})) >= num_prefill for role, gang in ready if role == "decode"):
            return pools
        if time.monotonic() > give_up_s or stop.wait(_PROGRESS_INTERVAL_S):
            return pools


def _raise_failures() -> None:
    app = serve.status().applications.get(APP_NAME)
    if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
        raise StartFailed(" ".join(dict.fromkeys(essence(message) for message in messages if message)))


def _is_coming_up(pool: dict[str, Any]) -> bool:
    """Its first gang is being started, and nothing has gone wrong yet: the service can do without, but not for long."""
    return not pool["trouble"] and all(gang["state"] == "starting" for gang in pool["gangs"])


def _say_roads(pools: Sequence[dict[str, Any]]) -> None:
    """What the self-test found of the ways from prefill to decode gangs."""
    for gang in (gang for pool in pools for gang in pool["gangs"]):
        for source, road in gang.get("kv_roads", {}).items():
            if road["error"]:
                say(f"no KV comes from {source} to {gang['gang_id']}, prompts are computed there: {road['error']}")
            else:
                pace = f"{road['megabytes_per_s']:.0f} MB/s, {road['latency_ms']:.2f} ms"
                is_slow = road["megabytes_per_s"] * 1e6 < SLOW_BYTES_PER_S
                say(f"KV from {source} to {gang['gang_id']}: {pace}" + (", a slow road" if is_slow else ""))


def _pool_line(pool: dict[str, Any]) -> str:
    gangs = ", ".join(f"{gang.get('gang_id', 'gang')} {gang['state']}" for gang in pool["gangs"])
    return f"pool {pool['pool']}: {gangs}" + (f" ({pool['trouble']})" if pool["trouble"] else "")


def _sentence(error: Exception) -> str:
    """What went wrong, here or in an actor, without a copy of its stack."""
    if isinstance(error, StartFailed):
        return str(error)
    return sentence_of(error.cause if isinstance(error, RayTaskError) else error)
