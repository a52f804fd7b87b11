"""What a router takes of many gangs: links, pings, KV events, and decisions among them.

    python benchmarks/gang_events.py --gangs 1000 --kv-rates 0 1 5 20

Three processes: gangs (the leader's table of clients and its wire format, on one event loop), a router (fleet, links,
KV mirrors, policy, bookings; no HTTP), and this one, which asks both. Half of the gangs compute prompts. A KV event
frame names `--blocks` blocks that are stored and as many that are removed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, cast

import psutil

from benchmarks.streams import process_with_pipe
from tensorweave.cli.arguments import positive, rate
from tensorweave.cli.figures import publish, report, settings_of
from tensorweave.cluster import wire
from tensorweave.cluster.block_hash import root_hash
from tensorweave.cluster.file_limit import raise_file_limit
from tensorweave.cluster.protocol import (
    PROTOCOL_VERSION,
    GangAddress,
    GenerateRequest,
    KvSource,
    ModelInfo,
    Role,
    SamplingSpec,
)

_HOST: Final = "127.0.0.1"
_SECRET: Final = "gangs"
_TICK_S: Final = 0.02
_PROMPT_TOKENS: Final = 1024
_NUM_PROMPTS: Final = 50
_PATIENCE_S: Final = 120.0


def _info(num_blocks: int) -> ModelInfo:
    return ModelInfo("simulated", 128_000, 131_072, "bfloat16", 32, num_blocks, kv_bytes_per_token=131_072)


# ---- the gangs' process


class _Leader:
    """A gang's clients. `note` stores blocks, and removes as many once the gang is full."""

    def __init__(self, info: ModelInfo) -> None:
        from tensorweave.workers.fakes.fake_executor import FakeExecutor
        from tensorweave.workers.leader.client_table import ClientTable

        self.table = ClientTable(FakeExecutor(info))
        self._info = info
        self._event_ids = itertools.count()
        self._held: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from tensorweave.workers.leader.client_table import MAX_UNSENT_BYTES, Client

        wire.tune_socket(writer)
        frames, client = wire.FrameReader(reader), Client(writer, MAX_UNSENT_BYTES)
        wire.check_hello(await anext(frames), _SECRET)
        client.send("hello", PROTOCOL_VERSION, self._info.to_wire())
        self.table.clients.add(client)
        async for frame in frames:
            self.table.receive(client, frame)
        self.table.disconnect(client)

    def note(self, num_blocks: int) -> None:
        names = [os.urandom(8).hex() for _ in range(num_blocks)]
        data: list[dict[str, Any]] = [
            {"type": "stored", "parent_hash": root_hash(None).hex(), "blocks": [{"block_hash": name} for name in names]}
        ]
        self._held += names
        if len(self._held) > self._info.num_blocks:
            data.append({"type": "removed", "block_hashes": self._held[:num_blocks]})
            del self._held[:num_blocks]
        self.table.publish([], [{"event_id": next(self._event_ids), "data": each} for each in data])


def run_gangs(pipe: Connection, num_gangs: int, num_blocks: int) -> None:
    """Serve until the pipe closes; sends the ports. A message is the rate of frames per gang and their blocks; (0, n)
    fills all gangs with n blocks. The answer to each is the number of frames so far."""
    import uvloop

    raise_file_limit()

    async def serve() -> None:
        leaders = [_Leader(_info(num_blocks)) for _ in range(num_gangs)]
        servers = [await asyncio.start_server(leader.serve, _HOST, 0) for leader in leaders]
        pipe.send([server.sockets[0].getsockname()[1] for server in servers])
        pings = asyncio.create_task(_ping(leaders))
        noting, counts = asyncio.create_task(asyncio.sleep(0)), [0]
        with contextlib.suppress(EOFError):
            while True:
                frame_rate, blocks = await asyncio.to_thread(pipe.recv)
                noting.cancel()
                if frame_rate:
                    noting = asyncio.create_task(_note(leaders, frame_rate, blocks, counts))
                elif blocks:
                    for leader in leaders:
                        leader.note(blocks)
                        await asyncio.sleep(0)
                pipe.send(counts[0])
        pings.cancel()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


async def _ping(leaders: list[_Leader]) -> None:
    """As `LeaderServer` does, each gang at a time of its own."""
    turns = itertools.cycle(leaders)
    owed, began_s = 0, time.monotonic()
    while True:
        await asyncio.sleep(_TICK_S)
        due = int((time.monotonic() - began_s) * len(leaders) / wire.PING_INTERVAL_S)
        for leader in itertools.islice(turns, due - owed):
            leader.table.ping()
        owed = due


async def _note(leaders: list[_Leader], frame_rate: float, blocks: int, counts: list[int]) -> None:
    turns = itertools.cycle(leaders)
    owed, began_s = 0, time.monotonic()
    while True:
        await asyncio.sleep(_TICK_S)
        due = int((time.monotonic() - began_s) * len(leaders) * frame_rate)
        for leader in itertools.islice(turns, due - owed):
            leader.note(blocks)
        counts[0] += due - owed
        owed = due


# ---- the router's process


class _Supervisor:
    """Publishes these gangs, once."""

    def __init__(self, addresses: list[GangAddress]) -> None:
        self.watch = self
        self._addresses = addresses

    async def remote(self, version: int, timeout_s: float, name: str) -> Any:
        from tensorweave.cluster.pool_spec import PoolState
        from tensorweave.cluster.service_state import ServiceState

        if version == 1:
            await asyncio.sleep(timeout_s)
        by_role: dict[Role, list[GangAddress]] = {}
        for address in self._addresses:
            by_role.setdefault(address.role, []).append(address)
        pools = [
            PoolState(role, len(own), tuple(own), ("ready",) * len(own), role=role) for role, own in by_role.items()
        ]
        return ServiceState(1, tuple(pools))


def _addresses(ports: list[int], num_blocks: int) -> Iterator[GangAddress]:
    for i, port in enumerate(ports):
        role: Role = "decode" if i % 2 else "prefill"
        source = KvSource(f"gang-{i}", (), {"model": "m"}, "s")
        yield GangAddress(f"gang-{i}", 1, role, _HOST, port, _SECRET, _info(num_blocks), source)


def run_router(pipe: Connection, ports: list[int], num_blocks: int) -> None:
    """Connects to all gangs, then answers "usage" (processor time, memory, blocks held) and "decide" (figures)."""
    import uvloop

    from tensorweave.cluster.fleet import WatchedFleet

    raise_file_limit()

    async def serve() -> None:
        before = _usage()
        fleet = WatchedFleet(cast(Any, _Supervisor(list(_addresses(ports, num_blocks)))))
        await fleet._wait_until(
            lambda: len(fleet.links("prefill")) + len(fleet.links("decode")) == len(ports), _PATIENCE_S
        )
        links = [*fleet.links("prefill"), *fleet.links("decode")]
        pipe.send((before, _usage()))
        asks: dict[str, Callable[[], Awaitable[Any]]] = {"decide": lambda: _decide(fleet)}
        with contextlib.suppress(EOFError):
            while True:
                asked = await asyncio.to_thread(pipe.recv)
                if asked == "usage":
                    pipe.send((*_usage(), sum(len(link.kv) for link in links), sum(link.is_open for link in links)))
                else:
                    pipe.send(await asks[asked]())
        await fleet.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


async def _decide(fleet: Any) -> dict[str, float]:
    """Processor time of a decision by its parts, as `Dispatcher` makes one: prompts that nobody holds, of which each
    stays until fifty more are there."""
    from tensorweave.router.dispatch.admission import Limits
    from tensorweave.router.dispatch.booking import Booking
    from tensorweave.router.dispatch.kv_view import PromptView
    from tensorweave.router.dispatch.loads import Loads
    from tensorweave.router.dispatch.policy import Joint, Options
    from tensorweave.router.dispatch.recovery import Recovery

    draw, loads, policy, limits = random.Random(0), Loads(), Joint(), Limits()
    open_bookings: list[Booking] = []
    spent = dict.fromkeys(("gangs_us", "route_us", "book_us"), 0.0)
    slowest_s = 0.0
    for number in range(_NUM_PROMPTS):
        tokens = [draw.randrange(128_000) for _ in range(_PROMPT_TOKENS)]
        request = GenerateRequest(str(number), tokens, SamplingSpec(max_tokens=128))
        began_s = time.thread_time()
        senders, decode = await Recovery(limits).wait_for_gangs(fleet, has_begun=False)
        found_s = time.thread_time()
        prompt = PromptView(request)
        route = policy.route(Options(senders, decode, prompt, loads))
        routed_s = time.thread_time()
        open_bookings.append(
            Booking(
                loads, prefill=route.prefill, decode=route.decode, num_prefill=_PROMPT_TOKENS,
                num_moved=_PROMPT_TOKENS, num_prompt=_PROMPT_TOKENS, num_reserved=128, now_s=float(number),
            )
        )  # fmt: skip
        booked_s = time.thread_time()
        spent["gangs_us"] += (found_s - began_s) * 1e6 / _NUM_PROMPTS
        spent["route_us"] += (routed_s - found_s) * 1e6 / _NUM_PROMPTS
        spent["book_us"] += (booked_s - routed_s) * 1e6 / _NUM_PROMPTS
        slowest_s = max(slowest_s, booked_s - began_s)
    for booking in open_bookings:
        booking.close()
    return {name: round(us, 1) for name, us in spent.items()} | {"slowest_us": round(slowest_s * 1e6, 1)}


def _usage() -> tuple[float, int]:
    return time.process_time(), int(psutil.Process().memory_info().rss)


# ---- this process


async def measure(num_gangs: int, args: argparse.Namespace) -> dict[str, Any]:
    async def ask(pipe: Connection, message: Any) -> Any:
        pipe.send(message)
        return await asyncio.to_thread(pipe.recv)

    async with (
        process_with_pipe(run_gangs, num_gangs, args.kv_blocks) as (_, gangs, ports),
        process_with_pipe(run_router, ports, args.kv_blocks) as (_, router, (before, connected)),
    ):
        figures: dict[str, Any] = {
            "gangs": num_gangs,
            "connect_ms_per_gang": round((connected[0] - before[0]) / num_gangs * 1e3, 3),
            "kib_per_gang": round((connected[1] - before[1]) / num_gangs / 1024, 1),
            "decision": await ask(router, "decide"),
        }
        await ask(gangs, (0, args.kv_blocks))
        await asyncio.sleep(1.0 + num_gangs * args.kv_blocks / 1e6)
        _, rss, num_held, _ = await ask(router, "usage")
        figures["held_blocks_per_gang"] = num_held // num_gangs
        figures["kib_per_gang_full"] = round((rss - before[1]) / num_gangs / 1024, 1)
        figures["decision_full"] = await ask(router, "decide")
        for frame_rate in args.kv_rates:
            first = await ask(gangs, (frame_rate, args.blocks))
            began_s, began = time.monotonic(), await ask(router, "usage")
            await asyncio.sleep(args.hold_s)
            ended, window_s = await ask(router, "usage"), time.monotonic() - began_s
            num_frames = await ask(gangs, (0, 0)) - first
            figures[f"kv_{frame_rate:g}_per_s"] = {
                "frames_per_s": round(num_frames / window_s),
                "cores": round((ended[0] - began[0]) / window_s, 3),
                "us_per_frame": round((ended[0] - began[0]) * 1e6 / num_frames, 1) if num_frames else 0.0,
                "open": ended[3],
            }
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gangs", type=positive, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--kv-blocks", type=positive, default=2000, help="of each gang")
    parser.add_argument("--kv-rates", type=float, nargs="+", default=[0.0, 1.0, 5.0, 20.0], help="frames/s of a gang")
    parser.add_argument("--blocks", type=positive, default=8, help="stored and removed per frame")
    parser.add_argument("--hold-s", type=rate, default=5.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for num_gangs in args.gangs:
        rows.append(asyncio.run(measure(num_gangs, args)))
        for name, value in rows[-1].items():
            print(f"{name:24}", value, flush=True)
    publish(report("gang_events", settings_of(args), {"rows": rows}), args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
