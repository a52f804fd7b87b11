"""Every private part of Ray that we use, in one place, and the Ray versions with which that was tested.

Ray has no public way to do what these functions do, and may change their ground in any release: with another version,
importing this module fails. `pyproject.toml` has the same bounds. To support another version, compare each function
with Ray's source, run the tests with it, and change `_FIRST` and `_BEYOND` here and there.

Serve's modules are imported where they are used: they take a second, and only routers and their driver need them.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import functools
import re
import secrets
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc
import psutil
import ray
from ray._common.tls_utils import load_certs_from_env
from ray._common.utils import get_default_ray_temp_dir
from ray._private import parameter, ray_constants, services, state, worker
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationTokenLoader,
    Config,
    GcsClient,
    PlacementGroupID,
)
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.util.placement_group import PlacementGroup

_FIRST: Final = (2, 60)
_BEYOND: Final = (2, 61)
"""Tested: from the one up to, and without, the other."""
_AGENT_KEEPER: Final = Path(__file__).resolve().with_name("ray_agent_keeper.py")
_JOIN_INTERVAL_S: Final = 0.5


class UntestedRay(ImportError):
    """This version of Ray is not one with which our use of its private parts was tested."""


def check_version(version: str) -> None:
    """Raises UntestedRay."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not _FIRST <= (int(found[1]), int(found[2])) < _BEYOND:
        bounds = ">={}.{},<{}.{}".format(*_FIRST, *_BEYOND)
        raise UntestedRay(
            f"Ray {version} is installed; tensorweave uses private parts of Ray and was tested with ray{bounds}: "
            f"pip install 'ray[serve]{bounds}'"
        )


check_version(ray.__version__)


# ---- the cluster


def find_head(address: str) -> str | None:
    """`host:port` of the head that `address` ("auto", "host:port") means; None if there is none."""
    found: str | None = services.canonicalize_bootstrap_address(address)
    return found


def connect_to_head(address: str) -> object:
    """Connect to the head's GCS. Raises RayError; waits without a limit."""
    return GcsClient(address=address)


def check_alive(gcs_address: str, *, uses_tls: bool, timeout_s: float) -> None:
    """Ask the head whether it lives, without a token. Raises grpc.RpcError."""
    options = [("grpc.enable_http_proxy", 0)]
    if uses_tls:
        chain, key, authority = load_certs_from_env()
        credentials = grpc.ssl_channel_credentials(
            root_certificates=authority, private_key=key, certificate_chain=chain
        )
        channel = grpc.secure_channel(gcs_address, credentials, options)
    else:
        channel = grpc.insecure_channel(gcs_address, options)
    with channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=timeout_s)


def reload_token() -> None:
    """Make Ray read its authentication mode and token from the environment again."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def free_resources_by_node() -> Mapping[str, Mapping[str, float]]:
    """Return the free resources of each node, by its id. Blocks."""
    free: Mapping[str, Mapping[str, float]] = state.available_resources_per_node()
    return free


def has_autoscaler() -> bool:
    """Whether an autoscaler has reported node groups to the GCS. Blocks."""
    config = state.state.get_cluster_config()
    return config is not None and bool(config.node_group_configs)


def placement_group_of(hex_id: str) -> PlacementGroup:
    return PlacementGroup(PlacementGroupID.from_hex(hex_id))


# ---- this process


def log_folder() -> Path:
    """Where Ray writes its logs, on each of its hosts."""
    return Path(get_default_ray_temp_dir()) / "session_latest" / "logs"


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Keep the cluster that is started inside off every interface but loopback.

    Ray replaces `_node_ip_address="127.0.0.1"` by the host's address. What does work is its switch for macOS and
    Windows (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER), which it reads when it is imported: hence the constant.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def in_own_process_groups() -> Iterator[None]:
    """Start Ray's processes in process groups of their own.

    Otherwise a signal to our group (`timeout`, a terminal that closes, a process supervisor) ends them while we still
    need them to drain. They die with this process all the same: Linux sees to that. On other systems a reaper in our
    group does, so there they stay in it.
    """
    before = services.ConsolePopen
    if sys.platform == "linux":
        services.ConsolePopen = functools.partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextlib.contextmanager
def on_free_agent_port() -> Iterator[None]:
    """Let the agent of the node that is started inside listen on any free port.

    Ray's own is a fixed one: a second Ray on a host tries it for 4 s, before which the node starts no worker.
    """
    before = parameter.RayParams
    parameter.RayParams = functools.partial(before, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = before


def forget_ray_after_fork() -> None:
    """In a forked child: Ray registers `ray.shutdown` for the end of the process, and a closure that kills what
    `all_processes` holds, for SIGTERM too."""
    atexit.unregister(ray.shutdown)
    node = worker._global_node
    if node is not None:
        node.all_processes.clear()


@contextlib.contextmanager
def filtered_messages(
    is_dropped: Callable[[str], bool], show: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[None]:
    """Drop lines that Ray would print for its driver, and let `show` print the others, if given. Enter it before Ray is
    started or joined."""
    before = worker.print_to_stdstream

    def print_rest(data: dict[str, Any], ignore_prefix: bool) -> None:
        lines = [line for line in data["lines"] if not is_dropped(line)]
        if show is not None:
            is_scaler = data.get("pid") == "autoscaler"
            show({**data, "lines": list(worker.filter_autoscaler_events(lines)) if is_scaler else lines})
        elif lines or not data["lines"]:
            before({**data, "lines": lines}, ignore_prefix)

    worker.print_to_stdstream = print_rest
    try:
        yield
    finally:
        worker.print_to_stdstream = before


# ---- a node that this process starts


def run_command_line(arguments: Sequence[str]) -> NoReturn:
    """`ray` with these arguments, in this process. Raises SystemExit with its exit code."""
    from ray.scripts import scripts

    scripts.cli.main(args=list(arguments), prog_name="ray")
    raise SystemExit(0)


@contextlib.contextmanager
def kept_agents() -> Iterator[None]:
    """Let the nodes that are started inside start their agents again instead of ending with them (Linux)."""
    before = services._build_python_executable_command_memory_profileable
    agents = (ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT)

    def build(component: str, session_dir: str, unbuffered: bool = True) -> list[str]:
        command: list[str] = before(component, session_dir, unbuffered)
        return [sys.executable, "-I", "-S", str(_AGENT_KEEPER), *command] if component in agents else command

    services._build_python_executable_command_memory_profileable = build
    try:
        yield
    finally:
        services._build_python_executable_command_memory_profileable = before


@contextlib.contextmanager
def patient_start(timeout_s: float) -> Iterator[None]:
    """Give a node that is started inside so long to join its cluster, unless its raylet ends. Ray's own limit is fixed:
    30 s."""
    before = services.get_node

    def get_node(gcs_address: str, node_id: str) -> object:
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                return before(gcs_address, node_id)
            except RuntimeError:
                if time.monotonic() > end_s or not _has_raylet():
                    raise
            time.sleep(_JOIN_INTERVAL_S)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = before


def _has_raylet() -> bool:
    """A child of this process is one that runs."""
    children = psutil.Process().children()
    return any(child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE for child in children)


# ---- a Serve replica, before it listens


class _RebindingSocket(socket.socket):
    def bind(self, address: object) -> None:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        super().bind(address)  # type: ignore[arg-type]


def allow_rebinding() -> None:
    """Bind the replica's port with SO_REUSEADDR.

    Serve binds without it. Connections that a dead replica closed stay in TIME_WAIT for 60 s, so that its replacement
    could not bind, and Serve would assume that another program has the port.
    """
    from ray.serve._private import http_util

    sockets = types.ModuleType("socket")
    sockets.__dict__.update(vars(socket), socket=_RebindingSocket)
    http_util.socket = sockets


def mark_generated_ids() -> str:
    """Give the request ids that Serve generates, for requests without one, a random prefix. Return the prefix.

    Without it they would count as ids given by clients, under which a request may be repeated: every request would be
    looked up at all gangs.
    """
    from ray.serve._private import http_util

    prefix, generate = f"{secrets.token_hex(8)}-", http_util.generate_request_id
    http_util.generate_request_id = lambda: prefix + generate()
    return prefix


def restore_print() -> None:
    """Undo Serve's `print`, which writes a tuple of its arguments to any file but standard error."""
    from ray.serve._private import logging_utils

    builtins.print = logging_utils.buildin_print


def serve_logger_name() -> str:
    from ray.serve._private.constants import SERVE_LOGGER_NAME

    name: str = SERVE_LOGGER_NAME
    return name
