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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from tensorweave.cluster.cluster_resources import can_grow, read_room
from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.kv_links import SLOW_BYTES_PER_S
from tensorweave.cluster.owner_liveness import OwnLifeline
from tensorweave.cluster.ray_auth import refuse_open_ray
from tensorweave.cluster.ray_noise import without_noise
from tensorweave.cluster.ray_session import start_or_join_ray
from tensorweave.cluster.sentences import essence, sentence_of
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.guardian import DRAIN_SLACK_S, SERVE_SHUTDOWN_TIMEOUT_S, Guardian, find_guardian
from tensorweave.deploy.home import APP_NAME, GUARDIAN_NAME, HEAD_NODE, NAMESPACE
from tensorweave.deploy.ingress import ingress_env
from tensorweave.deploy.pools import explain_shortage, needed_resources, pool_specs
from tensorweave.deploy.serve_app import build
from tensorweave.deploy.served_model import ServedModel
from tensorweave.deploy.stop_signal import StopSignal
from tensorweave.deploy.watch import RayCluster, RayLost, ServiceFailed, abandon_ray, watch

_CONTROL_TIMEOUT_S: Final = 60.0
_PROGRESS_INTERVAL_S: Final = 0.25
_LINKS_TIMEOUT_S: Final = 5.0


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
            url, guardian = _start(served, stop, ending)
        except (StartFailed, TensorweaveError, ValueError, OSError, RayError, RayServeException) as error:
            say(f"cannot start: {_sentence(error)}")
            return 1
        except StoppedEarly:
            say("stopped before it was ready")
            return 1
        say(f"ready: {config.model_name} at {url}/v1 (Serve's proxy at port {config.router.proxy_port})")
        if on_ready is not None:
            on_ready(url)
        code = _keep_up(config, guardian, stop, ending)
    say("stopped")
    return code


def _keep_up(config: ServeConfig, guardian: ActorHandle[Any], stop: StopSignal, ending: ExitStack) -> int:
    """Until the service is asked to stop, or cannot go on; returns the exit code."""
    try:
        watch(RayCluster(guardian), stop, config.limits.outage_timeout_s, _PoolTeller())
    except ServiceFailed as failure:
        say(f"giving up: {failure}")
        return 1
    except RayLost as loss:
        say(f"giving up: {loss}")
        ending.pop_all()  # nobody is left to ask for an end in order; what it held must not end when it is collected
        if not abandon_ray():
            os._exit(1)
        return 1
    name = "asked to stop" if stop.received is None else stop.received.name
    say(f"{name}: finishing running requests (up to {config.limits.drain_timeout_s:g} s), then stopping")
    return 0


class _PoolTeller:
    """Says how the pools are, whenever that changes."""

    def __init__(self) -> None:
        self.told = ""

    def __call__(self, pools: Sequence[dict[str, Any]]) -> None:
        line = "; ".join(_pool_line(pool) for pool in pools)
        if line and line != self.told:
            say(line)
            self.told = line


def _start(served: ServedModel, stop: StopSignal, ending: ExitStack) -> tuple[str, ActorHandle[Any]]:
    """Everything up to readiness; what must be undone goes on `ending`. Returns the URL and the guardian."""
    config = served.config
    deadline_s = time.monotonic() + config.limits.start_timeout_s
    _join_ray(config, ending)
    stop.arm()
    guardian = _post_guardian(config, ending)
    _check_ports(config, guardian)
    say(f"loading {config.shared_args.model}")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    env = ingress_env(config.router)
    http_options = {"host": config.router.host, "port": config.router.proxy_port}
    serve.start(http_options=http_options, controller_options={"runtime_env": {"env_vars": env}})
    target = serve.RunTarget(build(served, replica_env=env), name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    _await_ready(config, guardian, stop, deadline_s)
    _say_links(_await_links(guardian, stop))
    return f"http://{config.router.reachable_host}:{config.router.port}", guardian


def _join_ray(config: ServeConfig, ending: ExitStack) -> None:
    """A Ray cluster that can hold the pools and carries no Serve of somebody else's."""
    say("joining Ray" if config.ray.address or os.environ.get("RAY_ADDRESS") else "starting Ray")
    need = needed_resources(pool_specs(config, has_gpus=False))
    num_cpus = need.get("CPU", 1.0)
    ending.enter_context(without_noise())
    session = ending.enter_context(start_or_join_ray(config.ray.address, num_cpus=num_cpus, namespace=NAMESPACE))
    refuse_open_ray(is_allowed=config.security.allow_unauthenticated_ray)
    if session.is_private or (config.limits.place_timeout_s is None and not can_grow()):
        _check_room(config)
    if find_guardian() is not None:
        raise StartFailed("this Ray cluster already carries a tensorweave service; stop that one first")
    if serve.status().proxies:
        raise StartFailed(
            "Ray Serve already runs on this cluster, so the front door's port cannot be set; "
            "use another cluster, end it with `serve shutdown`, or deploy beside it with "
            "`serve run tensorweave.deploy.serve_app:build_app config=FILE.yaml`"
        )


def _check_room(config: ServeConfig) -> None:
    """No node will come: what an idle cluster could not hold, this one never will."""
    room = read_room()
    if shortage := explain_shortage(pool_specs(config, has_gpus=room.total("GPU") > 0), room):
        raise StartFailed(shortage)


def _post_guardian(config: ServeConfig, ending: ExitStack) -> ActorHandle[Any]:
    """The guardian, at its post until the end of the service, which it brings about."""
    drain_timeout_s = config.limits.drain_timeout_s
    lifeline = OwnLifeline()
    guardian: ActorHandle[Any] = (
        ray.remote(Guardian)
        .options(
            name=GUARDIAN_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            resources=HEAD_NODE,
        )
        .remote(drain_timeout_s, lifeline.name)
    )
    ending.callback(_end_service, guardian, lifeline, drain_timeout_s)
    return guardian


def _end_service(guardian: ActorHandle[Any], lifeline: OwnLifeline, drain_timeout_s: float) -> None:
    try:
        ray.get(guardian.end.remote(), timeout=drain_timeout_s + DRAIN_SLACK_S + SERVE_SHUTDOWN_TIMEOUT_S)
    except RayError as error:
        say(f"could not be taken down cleanly: {_sentence(error)}")
    except KeyboardInterrupt:
        say("not waiting any longer; on a cluster that stays, the service ends once its requests have")
        raise  # and the guardian goes on without us
    ray.kill(guardian)
    lifeline.end()


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
    tell, router = _PoolTeller(), config.router
    while True:
        _raise_failures()
        pools = ray.get(guardian.describe_pools.remote(), timeout=_CONTROL_TIMEOUT_S) or []
        for pool in pools:
            if pool["failure"]:
                raise StartFailed(f"pool {pool['pool']}: {pool['failure']}")
        tell(pools)
        doors = [
            guardian.probe.remote(router.reachable_host, port, "/ready") for port in (router.port, router.proxy_port)
        ]
        are_open = ray.get(doors, timeout=_CONTROL_TIMEOUT_S) == [200, 200]
        if are_open and not any(_is_coming_up(pool) for pool in pools):
            return
        if time.monotonic() > deadline_s:
            raise StartFailed(
                f"not ready within {config.limits.start_timeout_s:g} s (limits.start_timeout_s): {tell.told}"
            )
        if stop.wait(_PROGRESS_INTERVAL_S):
            raise StoppedEarly


def _await_links(guardian: ActorHandle[Any], stop: StopSignal) -> list[dict[str, Any]]:
    """The pools with every pair measured, or as they are after a few seconds: nothing waits for a measurement."""
    give_up_s = time.monotonic() + _LINKS_TIMEOUT_S
    while True:
        pools: list[dict[str, Any]] = ray.get(guardian.describe_pools.remote(), timeout=_CONTROL_TIMEOUT_S) or []
        ready = [(pool["role"], gang) for pool in pools for gang in pool["gangs"] if gang["state"] == "ready"]
        num_prefill = sum(role == "prefill" for role, _ in ready)
        if all(len(gang.get("kv_links", {})) >= num_prefill for role, gang in ready if role == "decode"):
            return pools
        if time.monotonic() > give_up_s or stop.wait(_PROGRESS_INTERVAL_S):
            return pools


def _raise_failures() -> None:
    app = serve.status().applications.get(APP_NAME)
    if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
        raise StartFailed(" ".join(dict.fromkeys(essence(message) for message in messages if message)))


def _is_coming_up(pool: dict[str, Any]) -> bool:
    """A first gang is being started, and nothing has gone wrong with it yet: the service can do without the pool, but
    not for long. Of a pool that has a gang the others may follow."""
    states = [gang["state"] for gang in pool["gangs"]]
    return "ready" not in states and any(gang["state"] == "starting" and not gang["reason"] for gang in pool["gangs"])


def _say_links(pools: Sequence[dict[str, Any]]) -> None:
    """What the self-test found of the ways from prefill to decode gangs."""
    for gang in (gang for pool in pools for gang in pool["gangs"]):
        for source, link in gang.get("kv_links", {}).items():
            if link["error"]:
                say(f"no KV comes from {source} to {gang['gang_id']}, prompts are computed there: {link['error']}")
            else:
                pace = f"{link['megabytes_per_s']:.0f} MB/s, {link['latency_ms']:.2f} ms"
                is_slow = link["megabytes_per_s"] * 1e6 < SLOW_BYTES_PER_S
                say(f"KV from {source} to {gang['gang_id']}: {pace}" + (", a slow link" if is_slow else ""))


def _pool_line(pool: dict[str, Any]) -> str:
    gangs = ", ".join(map(_gang_line, pool["gangs"]))
    is_whole = all(gang["state"] == "ready" for gang in pool["gangs"])
    return f"pool {pool['pool']}: {gangs}" + (f" ({pool['trouble']})" if pool["trouble"] and not is_whole else "")


def _gang_line(gang: dict[str, Any]) -> str:
    line = f"{gang.get('gang_id', 'gang')} {gang['state']}"
    return f"{line} [{gang['starting']}]" if gang.get("starting") else line


def _sentence(error: Exception) -> str:
    """What went wrong, here or in an actor, without a copy of its stack."""
    if isinstance(error, StartFailed):
        return str(error)
    return sentence_of(error.cause if isinstance(error, RayTaskError) else error)
