"""Our service and vLLM's server on a model of random weights, each in processes of its own, one at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tensorweave.cli.suite_shapes import ModelShape

ROOT = Path(__file__).resolve().parent.parent
MODEL_NAME = "bench"
STOP_TIMEOUT_S = 60.0


class ServerFailed(RuntimeError):
    """A server did not start in time, or ended; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Server:
    """How to start one: `path` is put in front of PYTHONPATH."""

    name: str
    arguments: Sequence[str]
    port: int
    path: str
    environment: Mapping[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def write_model(folder: Path, shape: ModelShape, dtype: str, tokenizer_dir: Path) -> Path:
    """A directory with the shape's config.json and the tokenizer's files. The vocabularies must agree."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (tokenizer_dir / name).exists():
            shutil.copy(tokenizer_dir / name, folder / name)
    return Path(shape.write(folder, dtype))


def our_service(model_dir: Path, dtype: str, engine: Mapping[str, Any], changes: Sequence[str], path: str) -> Server:
    """`tensorweave serve` with one gang of one rank behind one router replica, whose port clients connect to."""
    port = free_port()
    config = {
        "model": str(model_dir),
        "served_model_name": MODEL_NAME,
        "engine": {"load_format": "dummy", "dtype": dtype, "generation_config": "none", **engine},
        "pools": {"main": {"role": "both"}},
        "router": {"port": port, "proxy_port": free_port()},
        "admin": {"port": free_port()},
        "limits": {"max_inflight": 1024, "max_queued": 2048},
    }
    file = model_dir.parent / "service.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    arguments = ["-m", "tensorweave.cli.main", "serve", "--config", str(file)]
    for change in changes:
        arguments += ["--set", change]
    return Server("tensorweave", arguments, port, path, {})


def vllm_server(model_dir: Path, dtype: str, max_model_len: int, path: str) -> Server:
    """As shipped, except for the length of its sequences and the share of memory."""
    port = free_port()
    arguments = ["-m", "vllm.entrypoints.cli.main", "serve", str(model_dir), "--served-model-name", MODEL_NAME]
    arguments += ["--load-format", "dummy", "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--max-model-len", str(max_model_len), "--gpu-memory-utilization", "0.92"]
    arguments += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
    return Server("vLLM", arguments, port, path, {"VLLM_NO_USAGE_STATS": "1"})


@contextmanager
def running(server: Server, log: Path, timeout_s: float) -> Iterator[float]:
    """Start the server, wait until it has answered a request, and yield the seconds that took. At the end its processes
    are ended, so that the GPU is free.

    Raises:
        ServerFailed: It did not answer within `timeout_s`.
    """
    paths = [part for part in (server.path, str(ROOT)) if part]
    environment = {**os.environ, **server.environment, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    began_s = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *server.arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            while not _answers(server.url):
                if process.poll() is not None or time.monotonic() > began_s + timeout_s:
                    raise ServerFailed(f"{server.name} did not start:\n{_tail(log)}")
                time.sleep(0.5)  # it offers nothing to wait on
            yield time.monotonic() - began_s
        finally:
            _end(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    body = {"model": MODEL_NAME, "prompt": [11, 12, 13], "max_tokens": 2, "temperature": 0.0, "ignore_eos": True}
    try:
        return httpx.post(f"{url}/v1/completions", json=body, timeout=120.0).status_code == 200
    except httpx.TransportError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, and SIGKILL to what is left of its session."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
