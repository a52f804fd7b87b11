"""`deploy.service.run` as a process: both front ends answer, a dead router comes back at its port, the end leaves
nothing, and every start that must fail says why."""

from __future__ import annotations

import http.client
import json
import os
import pickle
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from tests.e2e.service_process import (
    END_TIMEOUT_S,
    START_TIMEOUT_S,
    RunningAnswer,
    ServiceProcess,
    admin_port,
    alive,
    command_of,
    complete,
    get_status,
    known_pools,
    num_generated,
    running_service,
    wait_for,
    wait_until,
    write_config,
    write_model,
)

pytestmark = pytest.mark.timeout(600)

PAGE = "https://chat.example.org"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def service(tmp_path: Path, model: Path) -> Iterator[tuple[ServiceProcess, int, int]]:
    config, port, proxy_port = write_config(tmp_path, model)
    names = "served_model_name=[tiny, tiny-too]"
    overrides = (names, f"security.cors_origins={PAGE}", "engine.guided_decoding_backend=auto")
    with running_service(config, *overrides) as service:
        yield service, port, proxy_port


def listener(port: int) -> int | None:
    """Pid of the process that listens on `port` of loopback."""
    for connection in psutil.net_connections("tcp4"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr == ("127.0.0.1", port):
            return connection.pid
    return None


def check_page(port: int) -> None:
    """A script of a page of another origin may ask, and list the model's names."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    connection.request("OPTIONS", "/v1/chat/completions", headers=asks)
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("access-control-allow-origin")) == (200, PAGE), answer.read()
    answer.read()
    connection.request("GET", "/v1/models/", headers={"Origin": PAGE})
    answer = connection.getresponse()
    assert answer.getheader("access-control-allow-origin") == PAGE
    assert [card["id"] for card in json.loads(answer.read())["data"]] == ["tiny", "tiny-too"]
    connection.request("HEAD", "/v1/models")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"")
    connection.close()


def check_admin(port: int) -> None:
    """The admin port tells of the gang and of the router once they have reported."""
    wait_until(lambda: get_status(admin_port(port), "/") == 200, END_TIMEOUT_S, "the admin port answers")
    wait_until(lambda: status_of(port)["routers"] != [], END_TIMEOUT_S, "the router has reported")
    wait_until(lambda: num_blocks(status_of(port)) > 0, END_TIMEOUT_S, "the gang has reported")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok"}
    connection.close()


def status_of(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", admin_port(port), timeout=60)
    connection.request("GET", "/status")
    status: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return status


def num_blocks(status: dict[str, Any]) -> int:
    """Of the one pool's gang; 0 as long as that is not known."""
    if not status["pools"]:
        return 0
    [pool] = status["pools"]
    blocks = pool["gangs"][0]["blocks"]
    return 0 if blocks is None else int(blocks["num_total"])


def test_a_service_from_start_to_drain(service: tuple[ServiceProcess, int, int], tmp_path: Path) -> None:
    process, port, proxy_port = service
    family = process.descendants()
    refuses_pickles(family, tmp_path / "mark")
    for listening_port in (port, proxy_port):
        assert num_generated(complete(listening_port)) == 4
        assert request_ids(listening_port, "trace-7") == ["trace-7"]
        [generated] = request_ids(listening_port, "no id") or []
        assert generated != "no id"
        check_page(listening_port)
    check_admin(port)

    # A router that dies with a client connected comes back at the same port: its dead connections do not keep the port.
    kept = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    kept.request("GET", "/version")
    assert kept.getresponse().read()
    router = listener(port)
    assert router is not None
    assert router != listener(proxy_port)
    os.kill(router, signal.SIGKILL)
    wait_until(lambda: get_status(port, "/ready") == 200, END_TIMEOUT_S, "a new router listens at the port")
    assert listener(port) not in (None, router)
    kept.close()

    family += process.descendants()

    # Drain: the running request ends, a new one is refused, then everything is gone.
    long = RunningAnswer(port, max_tokens=1500)
    told_before = process.output()
    process.process.send_signal(signal.SIGTERM)
    process.wait_line("SIGTERM", timeout_s=END_TIMEOUT_S)
    # Until it has heard of the end, it takes new work. If it has gone already, none is left to be refused.
    wait_until(lambda: get_status(port, "/ready") != 200, END_TIMEOUT_S, "new work is refused")
    if not is_turned_away(port):
        wait_until(lambda: long.is_over, END_TIMEOUT_S, "the port closes only after the last answer")
    assert long.num_generated() == 1500
    assert process.process.wait(timeout=END_TIMEOUT_S) == 0
    assert process.remaining_lines() == ["tensorweave: stopped"]
    assert process.output() == told_before, "a clean stop is silent"
    wait_until(lambda: not alive(family), END_TIMEOUT_S, "no process is left")
    assert listener(port) is None
    assert listener(proxy_port) is None


class Code:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def refuses_pickles(family: list[psutil.Process], mark: Path) -> None:
    """A stranger's pickle is unpickled by no replica's internal port, all of which other hosts may reach."""
    replicas = [process for process in family if "ServeReplica" in command_of(process)]
    assert len(replicas) == 2
    for replica in replicas:
        ports = [port.laddr.port for port in replica.net_connections("tcp") if port.status == psutil.CONN_LISTEN]
        assert grpc.StatusCode.UNAUTHENTICATED in [send_pickle(port, Code(mark)) for port in ports]
    assert not mark.exists()


def send_pickle(port: int, value: object) -> grpc.StatusCode | None:
    """The answer of the server at `port` to a call in Serve's own protocol."""
    request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(value), request_args=b"")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(request, timeout=60)
        except grpc.RpcError as error:
            return error.code()
    return None


def named(process: ServiceProcess, name: str) -> list[psutil.Process]:
    """The actors of this class: Ray names processes after them."""
    return [child for child in process.descendants() if command_of(child).startswith(f"ray::{name}")]


def the_one(process: ServiceProcess, name: str) -> psutil.Process:
    """The actor of this class, once there is one alone."""

    def find() -> list[psutil.Process]:
        found = named(process, name)
        return found if len(found) == 1 else []

    return wait_for(find, END_TIMEOUT_S, f"one {name}")[0]


def request_ids(port: int, given: str) -> list[str] | None:
    """Those that an answer carries."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/version", headers={"x-request-id": given})
        return connection.getresponse().headers.get_all("x-request-id")
    finally:
        connection.close()


def is_turned_away(port: int) -> bool:
    """Whether a new request is refused; False if no server answers."""
    try:
        status, refusal = complete(port)
    except (OSError, http.client.HTTPException):
        return False
    assert (status, refusal["error"]["code"]) == (503, "not_ready"), refusal
    return True


def check_log(process: ServiceProcess) -> None:
    """Each line is an object, whichever process wrote it."""
    entries = [json.loads(line) for line in [*process.lines, *process.remaining_lines()]]
    assert {"driver", "supervisor"} <= {entry["process"] for entry in entries}
    assert any(entry["process"].startswith("rank 0 of main-0") and "took" in entry["message"] for entry in entries)
    requests = [entry for entry in entries if entry["logger"] == "tensorweave.requests"]
    assert [entry["output_tokens"] for entry in requests] == [1500, 4]
    assert not [entry for entry in entries if "The capital" in json.dumps(entry)], "no prompt"


def test_a_service_survives_its_actors_and_a_killed_driver_leaves_nothing(tmp_path: Path, model: Path) -> None:
    config, port, proxy_port = write_config(tmp_path, model)
    log = ("logging.format=json", "logging.level=INFO", "logging.requests=true")
    with running_service(config, *log) as process:
        survives_its_actors(process, port, proxy_port)
        check_log(process)


def survives_its_actors(process: ServiceProcess, port: int, proxy_port: int) -> None:
    # What keeps the service up may die: the gang serves on, and everything is replaced.
    ranks = named(process, "RankWorker")
    through_it_all = RunningAnswer(port, max_tokens=1500)
    for actor in ("PoolSupervisor", "ServeReplica:tensorweave:Pools", "ProcessSentinel", "ServiceActor"):
        # Serve may just be replacing the pools' replica, because it found no supervisor.
        victim = the_one(process, actor)
        victim.kill()
        wait_until(
            lambda actor=actor, victim=victim: named(process, actor) not in ([], [victim]),
            END_TIMEOUT_S,
            f"a new {actor}",
        )
    assert through_it_all.num_generated() == 1500
    [gang] = known_pools(port)[0]["gangs"]
    assert (gang["state"], [rank["pid"] for rank in gang["ranks"]]) == ("ready", [rank.pid for rank in ranks])
    assert num_generated(complete(port)) == 4
    process.wait_line('"output_tokens": 4,', timeout_s=END_TIMEOUT_S)

    # Ray's own two agents look for the dead head for a minute before they end.
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    family = [child for child in process.descendants() if not command_of(child).startswith(agents)]
    assert len(family) >= 7, "Ray, the service actor, Serve, the routers and the ranks"
    process.process.kill()
    wait_until(lambda: not alive(family), END_TIMEOUT_S, "no process outlives a killed driver")
    assert listener(port) is None
    assert listener(proxy_port) is None


def fails_to_start(config: Path, *overrides: str) -> str:
    process = ServiceProcess(config, *overrides)
    try:
        line = process.wait_line("cannot start: ", timeout_s=START_TIMEOUT_S)
        assert process.process.wait(timeout=END_TIMEOUT_S) == 1
    finally:
        process.kill()
    return line.partition("cannot start: ")[2]


def test_a_taken_port_is_named(tmp_path: Path, model: Path) -> None:
    config, port, _ = write_config(tmp_path, model)
    with socket.create_server(("127.0.0.1", port)):
        line = fails_to_start(config)
    assert line == f"port {port} of 127.0.0.1 is taken; choose router.port and router.proxy_port anew"


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    config, _, _ = write_config(tmp_path, tmp_path / "no-such-model")
    assert str(tmp_path / "no-such-model") in fails_to_start(config)


def test_a_broken_model_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "broken"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "nothing"}')
    config, _, _ = write_config(tmp_path, directory)
    assert "model_type is 'nothing'" in fails_to_start(config)


def test_missing_gpus_are_counted(tmp_path: Path, model: Path) -> None:
    config, _, _ = write_config(tmp_path, model)
    line = fails_to_start(config, "engine.device=cuda", "pools.main.replicas=40", "pools.main.tensor_parallel_size=8")
    assert line.startswith("the pools (main: 40 x 8 rank(s)) need 320 GPUs, and the Ray cluster has ")
