"""What waits at one router while many requests arrive at once: /metrics and /health, streams that run, first tokens.

    python -m benchmarks.burst --requests 256 --prompt-len 1000 --max-tokens 200 --pin

Four processes: gangs that compute nothing (`FakeExecutor` behind the leader's server), a router without Ray, a client
that sends all requests at the same moment, and a watcher with some streams that run already, which also asks for
/metrics and /health, one request after another. The watcher's figures are given for the time before the burst, for the
time until the last of its first tokens, and for the rest of it. Where `router_waited_s` is more than a few hundredths,
other processes had the router's core. Exit code 1 if a request fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from benchmarks.streams import Stream, Usage, pin, process_with_pipe, request_bytes, run_gangs, run_router
from tensorweave.cli.arguments import positive, rate
from tensorweave.cli.figures import distribution, publish, report, settings_of
from tensorweave.workers.fakes.fake_executor import FAKE_INFO

_HOST: Final = "127.0.0.1"
_PATHS: Final = ("/metrics", "/health")
_ASK_EVERY_S: Final = 0.02
_QUIET_S: Final = 2.0
_PATIENCE_S: Final = 120.0
_MAX_EVENTS_PER_S: Final = 8000.0  # a service's default
_INFO: Final = replace(FAKE_INFO, vocab_size=49_152, max_seq_len=8192, num_blocks=20_000)


@dataclass(frozen=True, slots=True)
class Watched:
    """Times are those of `time.perf_counter`, which is one clock for all processes of a machine."""

    answers: dict[str, list[tuple[float, float]]]
    """By path: when asked, when answered."""
    events_s: list[list[float]]
    """Of each stream."""


def run_watcher(pipe: Connection, port: int, num_streams: int, num_tokens: int) -> None:
    """Sends something once every stream has begun; whatever is sent to it ends it, and it sends a `Watched`."""
    asyncio.run(_watch(pipe, port, num_streams, num_tokens))


async def _watch(pipe: Connection, port: int, num_streams: int, num_tokens: int) -> None:
    loop = asyncio.get_running_loop()
    request = request_bytes(port, {"prompt": list(range(100, 164)), "max_tokens": num_tokens})
    streams = [(await loop.create_connection(lambda: Stream(request), _HOST, port))[1] for _ in range(num_streams)]
    await asyncio.gather(*(stream.begun for stream in streams))
    answers: dict[str, list[tuple[float, float]]] = {path: [] for path in _PATHS}
    asking = [asyncio.create_task(_ask(port, path, answers[path])) for path in _PATHS]
    pipe.send("running")
    await asyncio.to_thread(pipe.recv)
    for task in asking:
        task.cancel()
    if any(stream.ended.done() for stream in streams):
        raise RuntimeError("a stream that was to run meanwhile has ended")
    pipe.send(Watched(answers, [stream.events_s for stream in streams]))


async def _ask(port: int, path: str, answers: list[tuple[float, float]]) -> None:
    """Over one connection, `_ASK_EVERY_S` after the last answer."""
    reader, writer = await asyncio.open_connection(_HOST, port)
    with contextlib.closing(writer):
        while True:
            asked_s = time.perf_counter()
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {_HOST}:{port}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not head.startswith(b"http/1.1 200"):
                raise RuntimeError(f"{path} answered {head[:40]!r}")
            await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
            answers.append((asked_s, time.perf_counter()))
            await asyncio.sleep(_ASK_EVERY_S)


def prompts_of(tokenizer: str, count: int, num_tokens: int) -> list[str]:
    """Texts of random tokens, as `vllm bench serve` makes them; each has about `num_tokens`."""
    from tensorweave.router.text.tokens import Tokenizer
    from tensorweave.workers.store.model_store import resolve_model

    draw, loaded = random.Random(0), Tokenizer.load(resolve_model(tokenizer))
    ids = sorted(set(range(1000, loaded.vocab_size)) - loaded.special_ids)
    return [loaded.decode(draw.choices(ids, k=num_tokens)) for _ in range(count)]


async def send_together(port: int, bodies: Sequence[dict[str, Any]]) -> list[Stream]:
    """All requests within a few milliseconds, over connections that are open; returns once all have ended."""
    loop, requests = asyncio.get_running_loop(), [request_bytes(port, body) for body in bodies]
    async with asyncio.timeout(_PATIENCE_S):
        streams = [(await loop.create_connection(Stream, _HOST, port))[1] for _ in bodies]
        for stream, request in zip(streams, requests, strict=True):
            stream.send(request)
        await asyncio.gather(*(stream.ended for stream in streams))
    return streams


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    prompts = prompts_of(args.tokenizer, args.requests, args.prompt_len)
    async with contextlib.AsyncExitStack() as running:
        num_inside = args.requests + args.streams + 16
        gangs = process_with_pipe(run_gangs, args.gangs, num_inside, args.step_s, _INFO)
        gangs_pid, _, gang_ports = await running.enter_async_context(gangs)
        router = process_with_pipe(run_router, gang_ports, args.tokenizer, num_inside, _MAX_EVENTS_PER_S)
        router_pid, _, port = await running.enter_async_context(router)
        watcher = process_with_pipe(run_watcher, port, args.streams, int(_PATIENCE_S / args.step_s))
        watcher_pid, pipe, _ = await running.enter_async_context(watcher)
        if args.pin:
            pin([router_pid], [gangs_pid, watcher_pid, os.getpid()])
        await send_together(port, [_body(prompts[0], 2)])  # warms the router up
        quiet_s, before = time.perf_counter(), Usage.of(router_pid)
        await asyncio.sleep(_QUIET_S)
        idle, waited_before_s, sent_s = Usage.of(router_pid), _waited_s(router_pid), time.perf_counter()
        streams = await send_together(port, [_body(prompt, args.max_tokens) for prompt in prompts])
        ended_s, after, waited_s = time.perf_counter(), Usage.of(router_pid), _waited_s(router_pid) - waited_before_s
        pipe.send("end")
        watched: Watched = await asyncio.to_thread(pipe.recv)
    whole = [stream for stream in streams if stream.ended.result()]
    first_s = [stream.events_s[0] for stream in whole]
    begun_s = max(first_s, default=ended_s)
    windows = {"quiet": (quiet_s, sent_s), "arriving": (sent_s, begun_s), "running": (begun_s, ended_s)}
    return {
        "failed": len(streams) - len(whole),
        "last_bytes": next((stream.last_bytes.decode() for stream in streams if not stream.ended.result()), ""),
        "first_token_ms": _ms([stream.events_s[0] - stream.sent_s for stream in whole]),
        "burst_s": round(ended_s - sent_s, 3),
        "router_cpu_s": {
            "quiet_per_s": round((idle.cpu_s - before.cpu_s) / _QUIET_S, 3),
            "burst": round(after.cpu_s - idle.cpu_s, 3),
        },
        "router_waited_s": round(waited_s, 3),
        **{
            f"{path.removeprefix('/')}_ms_{name}": _ms(_lengths(watched.answers[path], window))
            for path in _PATHS
            for name, window in windows.items()
        },
        **{
            f"gap_ms_{name}": _ms([gap for each in watched.events_s for gap in _lengths(list(pairwise(each)), window)])
            for name, window in windows.items()
        },
    }


def _waited_s(pid: int) -> float:
    """How long its main thread has waited for a core, which others had."""
    return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9


def _body(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens}


def _lengths(spans: Sequence[tuple[float, float]], window: tuple[float, float]) -> list[float]:
    """Of the spans that overlap the window."""
    return [end_s - begin_s for begin_s, end_s in spans if begin_s < window[1] and end_s > window[0]]


def _ms(seconds: Sequence[float]) -> dict[str, float]:
    figures = distribution(seconds, 1e3)
    return {name: round(figures[name], 1) for name in ("median", "p99", "max") if name in figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=positive, default=256)
    parser.add_argument("--prompt-len", type=positive, default=1000)
    parser.add_argument("--max-tokens", type=positive, default=200)
    parser.add_argument("--streams", type=positive, default=8, help="that run already")
    parser.add_argument("--gangs", type=positive, default=1)
    parser.add_argument("--step-s", type=rate, default=0.02, help="between two tokens of a stream")
    parser.add_argument("--pin", action="store_true", help="give the router a core, and the rest to the others")
    parser.add_argument("--tokenizer", default="smollm2", help="a model's name or directory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = asyncio.run(measure(args))
    publish(report("burst", settings_of(args), figures), args.json)
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
