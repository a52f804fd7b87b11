"""Which ports are taken, and what Serve is told of its ingress."""

from __future__ import annotations

import inspect
import socket
from pathlib import Path

import pytest
from ray.serve._private import constants

from tensorweave.deploy.config import ServeConfig, load_config
from tensorweave.deploy.ingress import ingress_env, taken_ports


def make_config(tmp_path: Path, *overrides: str) -> ServeConfig:
    path = tmp_path / "service.yaml"
    path.write_text("model: m", encoding="utf-8")
    return load_config(path, overrides)


OWN_HOST = "127.77.1.9"
"""A loopback address where nobody else takes a port that we have just let go."""


def test_only_ports_that_somebody_listens_on_are_taken() -> None:
    with socket.create_server((OWN_HOST, 0)) as listener:
        port = listener.getsockname()[1]
        assert taken_ports(OWN_HOST, [port]) == [port]
        # A connection that the server ends first leaves its port in TIME_WAIT, which takes nothing from a new service.
        with socket.create_connection((OWN_HOST, port)) as client:
            listener.accept()[0].close()
            assert client.recv(1) == b""
    assert taken_ports(OWN_HOST, [port]) == []


def test_a_host_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(OSError, match=r"[Cc]annot assign"):
        taken_ports("192.0.2.254", [8000])


def test_as_many_ingress_ports_as_replicas(tmp_path: Path) -> None:
    env = ingress_env(make_config(tmp_path, "router.port=9000", "router.replicas=3").router)
    first, end = (int(env[f"RAY_SERVE_DIRECT_INGRESS_{edge}_HTTP_PORT"]) for edge in ("MIN", "MAX"))
    assert list(range(first, end)) == [9000, 9001, 9002]


def test_serve_does_not_kill_a_proxy_that_the_start_still_waits_for(tmp_path: Path) -> None:
    env = ingress_env(make_config(tmp_path).router)
    tries, patience_s = constants.PROXY_HEALTH_CHECK_UNHEALTHY_THRESHOLD, constants.HTTP_PROXY_TIMEOUT
    assert float(env["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) * tries >= patience_s


def test_serve_knows_what_it_is_told(tmp_path: Path) -> None:
    known = inspect.getsource(constants)
    env = ingress_env(make_config(tmp_path).router)
    assert [name for name in env if name.startswith("RAY_SERVE_") and f'"{name}"' not in known] == []


def test_grpc_does_not_tell_of_a_routers_worker_processes(tmp_path: Path) -> None:
    assert ingress_env(make_config(tmp_path).router)["GRPC_ENABLE_FORK_SUPPORT"] == "0"
