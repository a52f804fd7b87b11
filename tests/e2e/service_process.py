"""A real service for tests: `tensorweave serve` in a process of its own, on free ports, with a small random model."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import NO_MEMORY_MONITOR, OVERLAP
from tests.router.small_tokenizers import byte_level

REPOSITORY = Path(__file__).resolve().parents[2]
T = TypeVar("T")

START_TIMEOUT_S = 200.0
END_TIMEOUT_S = 150.0
ANSWER_TIMEOUT_S = 120.0
DRAIN_TIMEOUT_S = 120.0
# Each of pytest's processes has ports of its own: between the search and the start of a service, another one may look.
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = range(23000, 31000, 37)[_PROCESS :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
_turns = itertools.count(os.getpid())


def write_model(directory: Path) -> Path:
    """A Llama of two layers with a tokenizer and a chat template."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=byte_level().vocab_size,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=2,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_level().backend.save_pretrained(directory)
    return directory


def free_ports(count: int) -> list[int]:
    """`count` neighbouring ports on which nobody listens, below those that systems give to connections. Each call looks
    elsewhere first: a port is taken some time after it has been found free, and other test runs look for theirs."""
    start = next(_turns) % len(_PORTS)
    for first in (*_PORTS[start:], *_PORTS[:start]):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(sockets):
                probe.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
        return list(range(first, first + count))
    raise AssertionError("no free ports")


def write_config(directory: Path, model: Path, **limits: float) -> tuple[Path, int, int]:
    """The service's file (YAML reads JSON), the port of its front end and that of its proxy. `admin_port` follows.

    Without grammars, for which each rank would start a process.
    """
    port, proxy_port, _ = free_ports(3)
    engine = {"device": "cpu", "dtype": "float32", "num_threads": 1, "guided_decoding_backend": None}
    settings = {
        "model": str(model),
        "served_model_name": "tiny",
        "engine": {**engine, "kv_cache_config": {"max_tokens": 8192}},
        "router": {"port": port, "proxy_port": proxy_port},
        "admin": {"port": admin_port(port)},
        "limits": {"drain_timeout_s": DRAIN_TIMEOUT_S, "start_timeout_s": START_TIMEOUT_S, **limits},
    }
    path = directory / "service.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path, port, proxy_port


def admin_port(port: int) -> int:
    """Of the service with this port of its front end."""
    return port + 2


def service_pools(port: int) -> list[dict[str, Any]]:
    """What the admin port says of the pools; nothing if it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", admin_port(port), timeout=60)
    try:
        connection.request("GET", "/health")
        pools: list[dict[str, Any]] = json.loads(connection.getresponse().read())["pools"]
        return pools
    except (OSError, http.client.HTTPException):
        return []
    finally:
        connection.close()


def known_pools(port: int) -> list[dict[str, Any]]:
    """The same once the supervisor has told it in time, which on a busy machine it may not."""
    return wait_for(lambda: service_pools(port), END_TIMEOUT_S, "the pools are known")


def service_environment() -> dict[str, str]:
    """Ours with our sources, and without what a Ray of ours has put there."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") or key == NO_MEMORY_MONITOR}
    paths = [str(REPOSITORY), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def overlap_arguments() -> list[str]:
    """What --overlap adds to a command that starts a service."""
    return ["--set", "engine.disable_overlap_scheduler=false"] if OVERLAP in os.environ else []


class ServiceProcess:
    """`tensorweave serve` and the lines of its log."""

    def __init__(self, config: Path, *overrides: str) -> None:
        command = [sys.executable, "-m", "tensorweave.cli.main", "serve", "--config", str(config)]
        for override in overrides:
            command += ["--set", override]
        command += overlap_arguments()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  kill closes it
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=service_environment(),
            stderr=subprocess.PIPE,
            stdout=self._output,
            text=True,
        )
        self.lines: list[str] = []
        self._arriving: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def output(self) -> str:
        """All of its standard output so far, which is Ray's: the service itself speaks on standard error."""
        return os.pread(self._output.fileno(), 1 << 20, 0).decode()

    def remaining_lines(self) -> list[str]:
        """Those after the last one waited for, once the service has ended."""
        self._reader.join(timeout=END_TIMEOUT_S)
        return [line for line in iter(self._arriving.get_nowait, None) if line is not None]

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self._arriving.put(line.rstrip("\n"))
        self._arriving.put(None)

    def wait_line(self, part: str, timeout_s: float = START_TIMEOUT_S) -> str:
        """The next line that contains `part`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                line = self._arriving.get(timeout=max(deadline_s - time.monotonic(), 0.001))
            except queue.Empty:
                line = None
            assert line is not None, f"no line with {part!r}; the service said:\n" + "\n".join(self.lines)
            self.lines.append(line)
            if part in line:
                return line

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=60)
        self._reader.join(timeout=60)
        self._output.close()


@contextmanager
def running_service(config: Path, *overrides: str) -> Iterator[ServiceProcess]:
    service = ServiceProcess(config, *overrides)
    try:
        service.wait_line("ready: ")
        yield service
    finally:
        service.kill()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_of(process: psutil.Process) -> str:
    """The command line of a process; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def wait_until(holds: Callable[[], bool], timeout_s: float, what: str, every_s: float = 0.1) -> float:
    """Wait until `holds()`; return the seconds."""
    started_s = time.monotonic()
    while not holds():
        assert time.monotonic() - started_s < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(every_s)
    return time.monotonic() - started_s


def wait_for(find: Callable[[], list[T]], timeout_s: float, what: str) -> list[T]:
    """What `find` returns once it finds something."""
    found: list[T] = []

    def has_found() -> bool:
        found[:] = find()
        return found != []

    wait_until(has_found, timeout_s, what)
    return found


def get_status(port: int, path: str) -> int | None:
    """None if no server answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def complete(port: int, max_tokens: int = 4) -> tuple[int, dict[str, Any]]:
    """Status and body of one completion that ends at its length."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_TIMEOUT_S)
    try:
        response = _post(connection, max_tokens)
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def _post(connection: http.client.HTTPConnection, max_tokens: int, **more: Any) -> http.client.HTTPResponse:
    body = {"model": "tiny", "prompt": "The capital", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps({**body, **more}), {"content-type": "application/json"})
    return connection.getresponse()


class RunningAnswer:
    """A streamed completion of so many tokens, read on a thread of its own. The first token has arrived once the
    constructor returns."""

    def __init__(self, port: int, max_tokens: int) -> None:
        self._has_begun = threading.Event()
        pool = ThreadPoolExecutor(1)
        self._reading = pool.submit(self._read, port, max_tokens)
        pool.shutdown(wait=False)
        assert self._has_begun.wait(ANSWER_TIMEOUT_S), "no token has come"

    @property
    def is_over(self) -> bool:
        return self._reading.done()

    def num_generated(self) -> int:
        """When it has ended, by the server's count."""
        return self._reading.result(timeout=ANSWER_TIMEOUT_S)

    def _read(self, port: int, max_tokens: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_TIMEOUT_S)
        count = 0
        try:
            response = _post(connection, max_tokens, stream=True, stream_options={"include_usage": True})
            assert response.status == 200, response.read()
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    assert "error" not in event, event
                    count = (event.get("usage") or {}).get("completion_tokens", count)
                    self._has_begun.set()
            return count
        finally:
            self._has_begun.set()
            connection.close()


def num_generated(answer: tuple[int, dict[str, Any]]) -> int:
    """The tokens of an answer of `complete`, which must have succeeded."""
    status, body = answer
    assert status == 200, body
    return int(body["usage"]["completion_tokens"])
