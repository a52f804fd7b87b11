"""How many streams one router process holds open: its own HTTP server, dispatcher and links, and engines that compute
nothing but take a set time for a step.

    python benchmarks/streams.py --streams 10000 --step-s 4

Three processes: gangs (`FakeExecutor` behind the leader's server), a router without Ray, and this client, which opens
its streams at `--rate` and keeps all of them open for `--hold-s`. Reports what a stream costs the router, and how late
events are. Exit code 1 if a stream fails. Needs two file descriptors more than streams in the client and the router.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import psutil

from tensorweave.cli.arguments import positive, rate
from tensorweave.cli.figures import distribution, publish, report, settings_of
from tensorweave.cluster.file_limit import raise_file_limit
from tensorweave.cluster.protocol import ModelInfo
from tensorweave.workers.fakes.fake_executor import FAKE_INFO, FakeExecutor

_HOST: Final = "127.0.0.1"
_SECRET: Final = "streams"
MODEL: Final = "simulated"
_START_TIMEOUT_S: Final = 120.0
_MOST_CONNECTING: Final = 256  # the router closes the oldest of more than 512 connections without a request
_SPARE_FILES: Final = 256
Context = multiprocessing.get_context("spawn")


def run_gangs(pipe: Connection, num_gangs: int, max_requests: int, step_s: float, info: ModelInfo = FAKE_INFO) -> None:
    """Serve until the pipe closes; sends the ports."""
    from tensorweave.workers.leader.server import LeaderServer

    executors = [FakeExecutor(info, step_s=step_s, max_requests=max_requests) for _ in range(num_gangs)]
    leaders = [LeaderServer(executor, _HOST, _SECRET) for executor in executors]
    pipe.send([leader.start() for leader in leaders])
    with contextlib.suppress(EOFError):
        pipe.recv()
    for leader, executor in zip(leaders, executors, strict=True):
        leader.stop(5.0)
        executor.shutdown()


def run_router(
    pipe: Connection, gang_ports: list[int], tokenizer: str, max_inflight: int, max_events_per_s: float = math.inf
) -> None:
    """Serve until the pipe closes; sends the port, then the number of tasks whenever it is asked."""
    import uvicorn
    import uvloop

    from tensorweave.cluster.without_torch import hide_torch_from_transformers
    from tensorweave.router.garbage_collection import spare_collections
    from tensorweave.router.http.connections import bound_connections

    hide_torch_from_transformers()
    bound_connections()

    async def serve() -> None:
        listener = socket.create_server((_HOST, 0), backlog=4096)
        app = await _router_app(gang_ports, tokenizer, max_inflight, max_events_per_s)
        spare_collections()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        serving = asyncio.create_task(server.serve([listener]))
        pipe.send(listener.getsockname()[1])
        with contextlib.suppress(EOFError):
            while True:
                await asyncio.to_thread(pipe.recv)
                pipe.send(len(asyncio.all_tasks()))
        server.should_exit = True
        await serving

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


async def _router_app(gang_ports: list[int], tokenizer: str, max_inflight: int, max_events_per_s: float) -> Any:
    from tensorweave.cluster.fleet import StaticFleet
    from tensorweave.cluster.protocol import GangAddress
    from tensorweave.cluster.socket_link import SocketLink
    from tensorweave.router.dispatch.admission import Limits
    from tensorweave.router.dispatch.dispatch import Dispatcher
    from tensorweave.router.http.app import build_app
    from tensorweave.router.service import RouterService
    from tensorweave.router.text.event_pace import EventPace
    from tensorweave.router.text.tokens import Tokenizer
    from tensorweave.workers.store.model_store import resolve_model

    links = [
        await SocketLink.connect(GangAddress(f"gang-{i}", 0, "both", _HOST, port, _SECRET, FAKE_INFO))
        for i, port in enumerate(gang_ports)
    ]
    fleet, limits = StaticFleet({"both": links}), Limits(max_inflight=max_inflight, max_deadline_s=86_400.0)
    service = RouterService(
        MODEL,
        Tokenizer.load(resolve_model(tokenizer)),
        Dispatcher(fleet, limits=limits),
        fleet,
        "0",
        limits,
        pace=EventPace(max_events_per_s),
    )
    return build_app(service)


class Stream(asyncio.Protocol):
    """One request and its events' times. `ended` is done with whether it ended as it should. Without a `request` it
    only connects, until `send`."""

    def __init__(self, request: bytes = b"") -> None:
        self._request = request
        self.last_bytes = b""
        self.sent_s = 0.0
        self.events_s: list[float] = []
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        if self._request:
            self.send(self._request)

    def send(self, request: bytes) -> None:
        self.sent_s = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if not self.last_bytes and not data.startswith(b"HTTP/1.1 200"):
            self._transport.close()
        self.events_s += [now_s] * data.count(b"data: {")
        if self.events_s and not self.begun.done():
            self.begun.set_result(None)
        self.last_bytes = (self.last_bytes + data)[-256:]
        if b"data: [DONE]" in self.last_bytes and not self.ended.done():
            self.ended.set_result(True)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for future, value in ((self.begun, None), (self.ended, False)):
            if not future.done():
                future.set_result(value)  # type: ignore[arg-type]


def request_bytes(port: int, fields: Mapping[str, Any]) -> bytes:
    """A streamed completion with these fields."""
    body = {"model": MODEL, **fields, "ignore_eos": True, "stream": True, "timeout_s": 80_000}
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {_HOST}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


@dataclass(frozen=True, slots=True)
class Usage:
    """Of processes together."""

    cpu_s: float
    rss_bytes: int
    num_files: int

    @classmethod
    def of(cls, *pids: int) -> Usage:
        processes = [psutil.Process(pid) for pid in pids]
        times = [process.cpu_times() for process in processes]
        return cls(
            sum(each.user + each.system for each in times),
            sum(process.memory_info().rss for process in processes),
            sum(process.num_fds() for process in processes),
        )


def pin(first: list[int], others: list[int]) -> None:
    """Each of the first to a core of its own, the others to the rest."""
    cores = sorted(os.sched_getaffinity(0))
    for pid, core in zip(first, cores, strict=False):
        os.sched_setaffinity(pid, {core})
    rest = set(cores[len(first) :]) or set(cores)
    for pid in others:
        for thread in psutil.Process(pid).threads():
            os.sched_setaffinity(thread.id, rest)


async def open_streams(
    ports: list[int], num_streams: int, num_prompt: int, max_tokens: int, rate_per_s: float
) -> list[Stream]:
    """Those that have begun to answer, or failed to. The routers take turns."""
    fields = {"prompt": list(range(100, 100 + num_prompt)), "max_tokens": max_tokens}
    requests = [(port, request_bytes(port, fields)) for port in ports]
    loop, connecting, began_s = asyncio.get_running_loop(), asyncio.Semaphore(_MOST_CONNECTING), time.perf_counter()

    async def one(number: int) -> Stream:
        await asyncio.sleep(max(0.0, began_s + number / rate_per_s - time.perf_counter()))
        port, request = requests[number % len(requests)]
        async with connecting:
            _, stream = await loop.create_connection(lambda: Stream(request), _HOST, port)
        await stream.begun
        return stream

    return await asyncio.gather(*(one(number) for number in range(num_streams)))


@contextlib.asynccontextmanager
async def process_with_pipe(target: Any, *arguments: Any) -> AsyncIterator[tuple[int, Connection, Any]]:
    """Its id, the pipe to it, and the first thing that it sends."""
    ours, theirs = Context.Pipe()
    process = Context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    assert process.pid is not None
    try:
        if not await asyncio.to_thread(ours.poll, _START_TIMEOUT_S):
            raise TimeoutError(f"{target.__name__} did not start within {_START_TIMEOUT_S} s")
        yield process.pid, ours, ours.recv()
    finally:
        ours.close()
        process.join(10.0)
        process.kill()


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as running:
        gangs = process_with_pipe(run_gangs, args.gangs, args.streams, args.step_s)
        gangs_pid, _, gang_ports = await running.enter_async_context(gangs)
        started = [
            await running.enter_async_context(
                process_with_pipe(run_router, gang_ports, args.tokenizer, args.streams + 16)
            )
            for _ in range(args.routers)
        ]
        routers, ports = [pid for pid, _, _ in started], [port for _, _, port in started]
        if args.pin:
            pin(routers, [gangs_pid, os.getpid()])
        for port in ports:
            (first,) = await open_streams([port], 1, args.prompt_len, 1, args.rate)  # warms the router up
            await first.ended
        idle, began_s = Usage.of(*routers), time.perf_counter()
        max_tokens = int((args.streams / args.rate * 2 + args.hold_s) / args.step_s) + 2
        streams = await open_streams(ports, args.streams, args.prompt_len, max_tokens, args.rate)
        opened, opened_s = Usage.of(*routers), time.perf_counter()
        pids = {"router": routers, "gangs": [gangs_pid], "client": [os.getpid()]}
        before = {name: Usage.of(*each).cpu_s for name, each in pids.items()}
        await asyncio.sleep(args.hold_s)
        held, held_s = Usage.of(*routers), time.perf_counter()
        cpu_s = {name: Usage.of(*each).cpu_s - before[name] for name, each in pids.items()}
        num_tasks = 0
        for _, pipe, _ in started:
            pipe.send("tasks")
            num_tasks += await asyncio.to_thread(pipe.recv)
        num_open = sum(not stream.ended.done() for stream in streams)
        are_whole = await asyncio.gather(*(stream.ended for stream in streams))
        ended = Usage.of(*routers)
    window_s = held_s - opened_s
    gaps_s = [
        later - earlier
        for stream in streams
        for earlier, later in pairwise(stream.events_s)
        if opened_s <= earlier and later <= held_s and later > earlier
    ]
    num_events = sum(opened_s <= event_s <= held_s for stream in streams for event_s in stream.events_s)
    return {
        "streams": len(streams),
        "open_together": num_open,
        "failed": are_whole.count(False),
        "last_bytes": next(
            (stream.last_bytes.decode() for stream, ok in zip(streams, are_whole, strict=True) if not ok), ""
        ),
        "opening_s": round(opened_s - began_s, 2),
        "first_event_s": _short([stream.events_s[0] - stream.sent_s for stream in streams if stream.events_s]),
        "events_per_s": round(num_events / window_s, 1),
        "due_events_per_s": round(len(streams) / args.step_s, 1),
        "gap_s": _short(gaps_s),
        "cores": {name: round(seconds / window_s, 3) for name, seconds in cpu_s.items()},
        "opening_cpu_ms_per_stream": round((opened.cpu_s - idle.cpu_s) / len(streams) * 1e3, 3),
        "event_cpu_us": round(cpu_s["router"] / max(1, num_events) * 1e6, 1),
        "memory_mib": {"idle": idle.rss_bytes >> 20, "held": held.rss_bytes >> 20, "ended": ended.rss_bytes >> 20},
        "memory_kib_per_stream": round((held.rss_bytes - idle.rss_bytes) / len(streams) / 1024, 1),
        "files": {"idle": idle.num_files, "held": held.num_files, "ended": ended.num_files},
        "tasks_per_stream": round(num_tasks / max(1, num_open), 2),
    }


def _short(values: list[float]) -> dict[str, float]:
    figures = distribution(values)
    return {name: round(figures[name], 3) for name in ("median", "p99", "max") if name in figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=positive, default=10_000)
    parser.add_argument("--routers", type=positive, default=1)
    parser.add_argument("--pin", action="store_true", help="give each router a core, and the rest to the others")
    parser.add_argument("--gangs", type=positive, default=16)
    parser.add_argument("--step-s", type=rate, default=4.0, help="between two tokens of a stream")
    parser.add_argument("--rate", type=rate, default=200.0, help="streams opened per second")
    parser.add_argument("--hold-s", type=rate, default=20.0)
    parser.add_argument("--prompt-len", type=positive, default=64)
    parser.add_argument("--tokenizer", default="smollm2", help="a model's name or directory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < args.streams + _SPARE_FILES:
        raise SystemExit(f"{most} file descriptors are too few for {args.streams} streams (ulimit -Hn)")
    raise_file_limit()
    figures = asyncio.run(measure(args))
    publish(report("streams", settings_of(args), figures), args.json)
    if figures["failed"]:
        print(f"a failed stream ended with {figures['last_bytes']}")
    return 1 if figures["failed"] or figures["open_together"] < args.streams else 0


if __name__ == "__main__":
    raise SystemExit(main())
