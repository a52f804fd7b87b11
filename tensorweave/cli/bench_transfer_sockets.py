"""The tcp carrier over loopback, from the giver's pool to the last verified block in the taker's, against bare sockets
that send messages of the same size: the same bytes from memory to memory, and one buffer again and again (which never
leaves the caches).

Giver and taker are two processes; in each round every way has its turn, and medians are compared. What digests cost is
told apart: the same fetches unchecked, and the rate at which a giver digests blocks in its pool.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

import torch

from tensorweave.cli.bench_transfer_fetches import Shape, Unchecked
from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.transfer.carrier import Claim, Ended
from tensorweave.workers.transfer.carriers.tcp import TcpCarrier
from tensorweave.workers.transfer.receiving.block_receiver import Intake, TargetBlocks
from tensorweave.workers.transfer.sending.offered_blocks import BlockTags, OfferedBlocks
from tensorweave.workers.transfer.transfer_stats import TransferStats
from tensorweave.workers.transfer.transports.transport import HostTransport
from tensorweave.workers.transfer.window import PoolWindow

TOTAL_BYTES: Final = 256 << 20
NUM_ROUNDS: Final = 7
_TIMEOUT_S: Final = 60.0
_SECRET: Final = "bench"


SHAPES: Final = (
    Shape("SmolLM2, float32", 30, 3, 64, "float32"),
    Shape("SmolLM2, bfloat16", 30, 3, 64, "bfloat16"),
    Shape("8B, bfloat16", 32, 8, 128, "bfloat16"),
    Shape("4 layers, 2 heads of 16, float32", 4, 2, 16, "float32"),
)
WAYS: Final = ("bare", "bare_one_buffer", "unchecked", "carrier")


@dataclass(frozen=True, slots=True)
class Figures:
    """Rates in bytes a second; `message_bytes` is the message size of all. `carrier` checks digests."""

    shape: Shape
    message_bytes: int
    bare: float
    bare_one_buffer: float
    unchecked: float
    carrier: float
    giver_digests: float

    @property
    def share(self) -> float:
        return self.carrier / self.bare

    def row(self) -> dict[str, Any]:
        rates = {f"{way}_gb_per_s": getattr(self, way) / 1e9 for way in (*WAYS, "giver_digests")}
        return {
            "blocks": self.shape.name,
            "message_mb": self.message_bytes / 1e6,
            **rates,
            "share_of_bare": self.share,
            "share_of_one_buffer": self.carrier / self.bare_one_buffer,
        }


def measure(shape: Shape, total_bytes: int = TOTAL_BYTES, num_rounds: int = NUM_ROUNDS) -> Figures:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_give, args=(theirs, shape, total_bytes, num_rounds), daemon=True)
    child.start()
    try:
        return _take(ours, shape, total_bytes, num_rounds)
    finally:
        child.join(_TIMEOUT_S)


def _claim(name: str, window: PoolWindow) -> Claim:
    return Claim(name, name, {}, "", 0, len(window.heads), 0)


def _message_bytes(window: PoolWindow) -> int:
    num_heads = len(window.heads)
    return HostTransport(window).giving().loader.message_blocks(num_heads) * window.block_bytes(num_heads)


def _give(pipe: Connection, shape: Shape, total_bytes: int, num_rounds: int) -> None:
    """Waits for the taker to name a way, and says when it is ready to go that way."""
    torch.set_num_threads(1)
    window = shape.make_window(total_bytes, torch.device("cpu"))
    num_blocks = window.num_blocks
    carrier = TcpCarrier(window, {}, "127.0.0.1", _SECRET)
    offered, start_s = OfferedBlocks(window, BlockTags(), ""), time.perf_counter()
    offered.add(range(num_blocks), [shape.tokens_per_block] * num_blocks)
    digest_rate = num_blocks * window.block_bytes(len(window.heads)) / (time.perf_counter() - start_s)
    offered.complete(0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send((carrier.address, listener.getsockname(), digest_rate))
        bare, _ = listener.accept()
    memory, size = window.memory, _message_bytes(window)
    assert memory is not None
    for _ in range((num_rounds + 1) * len(WAYS)):
        way, ticket = pipe.recv()
        pipe.send("ready")
        if way in ("unchecked", "carrier"):
            carrier.offer(ticket, offered)
            continue
        pipe.recv()
        for at in range(0, len(memory) // size * size, size):
            bare.sendall(memory[:size] if way == "bare_one_buffer" else memory[at : at + size])
    pipe.recv()
    carrier.shutdown()
    bare.close()


def _take(pipe: Connection, shape: Shape, total_bytes: int, num_rounds: int) -> Figures:
    torch.set_num_threads(1)
    window = shape.make_window(total_bytes, torch.device("cpu"))
    num_blocks = window.num_blocks
    carrier = TcpCarrier(window, {}, "127.0.0.1", _SECRET)
    if not pipe.poll(_TIMEOUT_S):
        raise TransferFailed("the giving process has not come up")
    (host, port), bare_place, digest_rate = pipe.recv()
    bare = socket.create_connection(bare_place)
    endpoint = KvEndpoint(host, port, 0, len(window.heads))
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(num_rounds + 1):
        for way in WAYS:
            claim = _claim(f"{number}-{way}", window)
            pipe.send((way, claim.ticket_id))
            pipe.recv()
            if way.startswith("bare"):
                pipe.send("go")
                times[way].append(_receive_bare(bare, window, way == "bare_one_buffer"))
            else:
                times[way].append(_fetch(carrier, endpoint, claim, window, num_blocks, way == "carrier"))
    pipe.send("enough")
    carrier.shutdown()
    bare.close()
    size, total = _message_bytes(window), num_blocks * window.block_bytes(len(window.heads))
    moved = {way: total // size * size if way.startswith("bare") else total for way in WAYS}
    rates = {way: moved[way] / statistics.median(times[way][1:]) for way in WAYS}
    return Figures(shape, size, **rates, giver_digests=digest_rate)


def _receive_bare(sock: socket.socket, window: PoolWindow, is_one_buffer: bool) -> float:
    memory, size = window.memory, _message_bytes(window)
    assert memory is not None
    start_s = time.perf_counter()
    for at in range(0, len(memory) // size * size, size):
        view = memory[:size] if is_one_buffer else memory[at : at + size]
        while len(view):
            view = view[sock.recv_into(view) :]
    return time.perf_counter() - start_s


def _fetch(
    carrier: TcpCarrier, endpoint: KvEndpoint, claim: Claim, window: PoolWindow, num_blocks: int, is_checked: bool
) -> float:
    """Seconds until every block is in the pool."""
    heads, arrival = range(len(window.heads)), TargetBlocks(window, 0, range(num_blocks))
    intake = Intake(arrival, heads, dict.fromkeys(range(num_blocks), window.tokens_per_block), TransferStats())
    start_s = time.perf_counter()
    carrier.fetch(endpoint, _SECRET, claim, intake if is_checked else Unchecked(arrival, heads))
    events = carrier.poll(_TIMEOUT_S)
    took_s = time.perf_counter() - start_s
    is_whole = not is_checked or intake.num_verified() == num_blocks
    if not any(isinstance(event, Ended) for event in events) or not is_whole:
        raise TransferFailed(f"not all blocks have come: {events}")
    carrier.close(claim.ticket_id)
    return took_s
