"""What `deploy.service` is made of, without Ray: ports, signals, and what the cluster lacks."""

from __future__ import annotations

import inspect
import os
import signal
import socket
from pathlib import Path

import pytest
from ray.serve._private import constants

from tensorweave.cluster.cluster_resources import ClusterResources, NodeResources
from tensorweave.deploy.config import ServeConfig, load_config
from tensorweave.deploy.ingress import ingress_env, taken_ports
from tensorweave.deploy.pools import explain_shortage, needed_resources, pool_specs
from tensorweave.deploy.stop_signal import StopSignal


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_wait(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.wait(0)
        signal.signal(number, signal.SIG_IGN)  # as ray.init does with some
        stop.arm()
        os.kill(os.getpid(), number)
        assert stop.wait(60)
        assert stop.received is number
        assert signal.getsignal(number) == before, "a second signal acts as before"
    assert signal.getsignal(number) == before


def test_what_the_pools_need_is_counted(tmp_path: Path) -> None:
    config = make_config(tmp_path, "pools.main.replicas=2", "pools.main.tensor_parallel_size=3", "engine.device=cuda")
    specs = pool_specs(config, has_gpus=False)
    assert needed_resources(specs) == {"CPU": 6.0, "GPU": 6.0}
    assert explain_shortage(specs, one_node({"CPU": 6.0, "GPU": 6.0})) is None
    assert explain_shortage(specs, one_node({"CPU": 8.0})) == (
        "the pools (main: 2 x 3 rank(s)) need 6 GPUs, and the Ray cluster has 0; "
        "by node: h: 8 of 8 CPU free, 0 of 0 GPU free"
    )


def test_a_sum_that_suffices_is_refused_where_no_node_has_a_rank(tmp_path: Path) -> None:
    specs = pool_specs(make_config(tmp_path, "pools.main.tensor_parallel_size=2", "engine.device=cuda"), has_gpus=True)
    nodes = [NodeResources(name, total, total) for name, total in (("cpus", {"CPU": 8.0}), ("gpus", {"GPU": 8.0}))]
    assert explain_shortage(specs, ClusterResources(nodes)) == (
        "pool main has 2 rank(s) with 1 CPU, 1 GPU each, every one on one node, and the nodes of the Ray cluster "
        "hold 0 such; by node: cpus: 8 of 8 CPU free, 0 of 0 GPU free; gpus: 0 of 0 CPU free, 8 of 8 GPU free"
    )


def one_node(total: dict[str, float]) -> ClusterResources:
    return ClusterResources([NodeResources("h", total, total)])


def test_device_auto_takes_gpus_where_there_are_some(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert pool_specs(config, has_gpus=True)[0].gang.gpus_per_rank == 1.0
    assert pool_specs(config, has_gpus=False)[0].gang.gpus_per_rank == 0.0


def test_ranks_receive_what_was_written(tmp_path: Path) -> None:
    config = make_config(tmp_path, "engine.max_batch_size=7", "engine.kv_cache_config.max_tokens=64")
    args = pool_specs(config, has_gpus=False)[0].gang.args
    assert (args["max_batch_size"], args["kv_cache_config"]["max_tokens"]) == (7, 64)
    assert "replicas" not in args
