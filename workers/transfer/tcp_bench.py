"""What the TCP carrier moves over loopback, digests checked, against a bare Python socket with the same messages.

`python -m tensorweave.workers.transfer.tcp_bench` prints a table. Giver and taker are two processes; for each shape of
blocks, bare socket and carrier take turns, and medians are compared. Digests are timed apart.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

import torch

from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.kv_pool import KVPool
from tensorweave.workers.transfer.carrier import Claim, Ended
from tensorweave.workers.transfer.desk import Desk, Serving
from tensorweave.workers.transfer.intake import Intake, Landing
from tensorweave.workers.transfer.loader import HOST_PARCEL_BYTES, PoolLoader
from tensorweave.workers.transfer.shelf import BlockTags, Shelf
from tensorweave.workers.transfer.stream import tensor_bytes
from tensorweave.workers.transfer.tally import Tally
from tensorweave.workers.transfer.tcp import TcpCarrier
from tensorweave.workers.transfer.window import PoolWindow

TOTAL_BYTES: Final = 512 << 20
NUM_ROUNDS: Final = 7
_TIMEOUT_S: Final = 60.0
_SECRET: Final = "bench"


@dataclass(frozen=True, slots=True)
class BlockShape:
    name: str
    num_layers: int
    num_heads: int
    tokens_per_block: int
    head_dim: int
    dtype: torch.dtype


SHAPES: Final = (
    BlockShape("30 layers, 3 heads of 64, float32", 30, 3, 32, 64, torch.float32),
    BlockShape("30 layers, 3 heads of 64, bfloat16", 30, 3, 32, 64, torch.bfloat16),
    BlockShape("32 layers, 8 heads of 128, bfloat16", 32, 8, 32, 128, torch.bfloat16),
    BlockShape("4 layers, 2 heads of 16, float32", 4, 2, 32, 16, torch.float32),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Rates in bytes a second; `parcel_bytes` is the message size of both."""

    shape: BlockShape
    parcel_bytes: int
    bare: float
    carrier: float
    digest: float

    @property
    def share(self) -> float:
        return self.carrier / self.bare


def measure(shape: BlockShape, total_bytes: int = TOTAL_BYTES, num_rounds: int = NUM_ROUNDS) -> Figures:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_give, args=(theirs, shape, total_bytes, num_rounds), daemon=True)
    child.start()
    try:
        return _take(ours, shape, total_bytes, num_rounds)
    finally:
        child.join(_TIMEOUT_S)


def _window(shape: BlockShape, total_bytes: int) -> tuple[PoolWindow, int]:
    """A pool of random bits, and how many blocks it has."""
    block_bytes = (
        shape.num_layers * 2 * shape.num_heads * shape.tokens_per_block * shape.head_dim * shape.dtype.itemsize
    )
    num_blocks = total_bytes // block_bytes
    P, H = shape.tokens_per_block, shape.head_dim
    pool = KVPool(shape.num_layers, num_blocks, shape.num_heads, P, H, shape.dtype, torch.device("cpu"))
    pool.cache.view(torch.uint8).random_(generator=torch.Generator().manual_seed(0))
    return PoolWindow(pool), num_blocks


def _claim(number: int, window: PoolWindow) -> Claim:
    return Claim(f"c{number}", f"t{number}", {}, "", 0, len(window.heads), 0)


def _parcel_bytes(window: PoolWindow) -> int:
    loader = PoolLoader(window, HOST_PARCEL_BYTES)
    return Serving(Desk(window, {}), _claim(0, window), loader).parcel_bytes


def _give(pipe: Connection, shape: BlockShape, total_bytes: int, num_rounds: int) -> None:
    torch.set_num_threads(1)
    window, num_blocks = _window(shape, total_bytes)
    carrier = TcpCarrier(window, {}, "127.0.0.1", _SECRET)
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send((carrier.address, listener.getsockname()))
    bare, _ = listener.accept()
    staging = tensor_bytes(torch.ones(_parcel_bytes(window), dtype=torch.uint8))
    tags = BlockTags()
    for number in range(num_rounds + 1):
        shelf = Shelf(window, tags, "")
        shelf.add(range(num_blocks), [shape.tokens_per_block] * num_blocks)
        shelf.complete(0)
        carrier.offer(f"t{number}", shelf)
        pipe.recv()
        for _ in range(total_bytes // len(staging)):
            bare.sendall(staging)
        pipe.recv()
        carrier.close(f"t{number}")
    carrier.shutdown()
    bare.close()
    listener.close()


def _take(pipe: Connection, shape: BlockShape, total_bytes: int, num_rounds: int) -> Figures:
    torch.set_num_threads(1)
    window, num_blocks = _window(shape, total_bytes)
    carrier = TcpCarrier(window, {}, "127.0.0.1", _SECRET)
    if not pipe.poll(_TIMEOUT_S):
        raise TransferFailed("the giving process has not come up")
    (host, port), bare_place = pipe.recv()
    bare = socket.create_connection(bare_place, timeout=_TIMEOUT_S)
    parcel_bytes = _parcel_bytes(window)
    endpoint = KvEndpoint(host, port, 0, len(window.heads))
    bares, carriers = [], []
    for number in range(num_rounds + 1):
        pipe.send("bare")
        bares.append(_receive_bare(bare, parcel_bytes, total_bytes // parcel_bytes))
        carriers.append(_fetch(carrier, endpoint, _claim(number, window), window, num_blocks))
        pipe.send("fetched")
    carrier.shutdown()
    bare.close()
    bare_s, carrier_s = statistics.median(bares[1:]), statistics.median(carriers[1:])
    num_bare = total_bytes // parcel_bytes * parcel_bytes
    num_carried = num_blocks * window.block_bytes(len(window.heads))
    return Figures(shape, parcel_bytes, num_bare / bare_s, num_carried / carrier_s, _digest_rate(window, num_blocks))


def _receive_bare(sock: socket.socket, parcel_bytes: int, num_parcels: int) -> float:
    buffer = memoryview(bytearray(parcel_bytes))
    start_s = time.perf_counter()
    for _ in range(num_parcels):
        view = buffer
        while len(view):
            view = view[sock.recv_into(view) :]
    return time.perf_counter() - start_s


def _fetch(carrier: TcpCarrier, endpoint: KvEndpoint, claim: Claim, window: PoolWindow, num_blocks: int) -> float:
    """Seconds until every block is verified and in the pool."""
    landing = Landing(window, 0, range(num_blocks))
    wanted = dict.fromkeys(range(num_blocks), window.tokens_per_block)
    intake = Intake(landing, range(len(window.heads)), wanted, Tally())
    start_s = time.perf_counter()
    carrier.fetch(endpoint, _SECRET, claim, intake)
    events = carrier.poll(_TIMEOUT_S)
    took_s = time.perf_counter() - start_s
    if not any(isinstance(event, Ended) for event in events) or intake.num_verified() != num_blocks:
        raise TransferFailed(f"not all blocks have come: {events}")
    carrier.close(claim.ticket_id)
    return took_s


def _digest_rate(window: PoolWindow, num_blocks: int) -> float:
    """Of blocks in the pool, from memory."""
    start_s = time.perf_counter()
    for block in range(num_blocks):
        window.digest(block, window.tokens_per_block)
    return num_blocks * window.block_bytes(len(window.heads)) / (time.perf_counter() - start_s)


def main() -> None:
    out = sys.stdout
    out.write(
        "| blocks | message | bare socket GB/s | carrier GB/s | share | digests GB/s |\n|---|---|---|---|---|---|\n"
    )
    for shape in SHAPES:
        figures = measure(shape)
        rates = (
            f"{figures.bare / 1e9:.2f} | {figures.carrier / 1e9:.2f} | {figures.share:.0%} | {figures.digest / 1e9:.1f}"
        )
        out.write(f"| {shape.name} | {figures.parcel_bytes / 1e6:.2f} MB | {rates} |\n")
        out.flush()


if __name__ == "__main__":
    main()
