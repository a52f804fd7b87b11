"""The TCP carrier over loopback, from the sender's pool to the last verified block in the receiver's, against bare
sockets that send messages of the same size: the same bytes from memory to memory, and one buffer repeatedly (which
never leaves the CPU's caches).

Sender and receiver are two processes. Every round measures each method once, and medians are compared. The cost of
digests is measured separately: the same fetches unchecked, and the rate at which a sender digests blocks in its pool.
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

from tensorweave.cli.bench_transfer_fetches import Shape, fetch, make_carrier, offer_pool
from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.transfer.transports.host import HostTransport
from tensorweave.workers.transfer.window import PoolWindow

TOTAL_BYTES: Final = 256 << 20
NUM_ROUNDS: Final = 7
_TIMEOUT_S: Final = 60.0

SHAPES: Final = (
    Shape("SmolLM2, float32", 30, 3, 64, "float32"),
    Shape("SmolLM2, bfloat16", 30, 3, 64, "bfloat16"),
    Shape("8B, bfloat16", 32, 8, 128, "bfloat16"),
    Shape("4 layers, 2 heads of 16, float32", 4, 2, 16, "float32"),
)
METHODS: Final = ("bare", "bare_one_buffer", "unchecked", "carrier")


@dataclass(frozen=True, slots=True)
class SocketFigures:
    """Rates in bytes per second, at messages of `message_bytes`. `carrier` checks digests."""

    shape: Shape
    message_bytes: int
    bare: float
    bare_one_buffer: float
    unchecked: float
    carrier: float
    sender_digests: float

    def row(self) -> dict[str, Any]:
        rates = {f"{method}_gb_per_s": getattr(self, method) / 1e9 for method in (*METHODS, "sender_digests")}
        return {
            "blocks": self.shape.name,
            "message_mb": self.message_bytes / 1e6,
            **rates,
            "share_of_bare": self.carrier / self.bare,
            "share_of_one_buffer": self.carrier / self.bare_one_buffer,
        }


def measure(shape: Shape, total_bytes: int = TOTAL_BYTES, num_rounds: int = NUM_ROUNDS) -> SocketFigures:
    context = multiprocessing.get_context("spawn")
    pipe, child_pipe = context.Pipe()
    child = context.Process(target=_run_sender, args=(child_pipe, shape, total_bytes), daemon=True)
    child.start()
    try:
        return _run_receiver(pipe, shape, total_bytes, num_rounds)
    finally:
        child.join(_TIMEOUT_S)


def _run_sender(pipe: Connection, shape: Shape, total_bytes: int) -> None:
    """Send over the bare socket whenever the receiver names a method; it fetches by itself."""
    torch.set_num_threads(1)
    window = shape.make_window(total_bytes, torch.device("cpu"))
    carrier = make_carrier(window, "tcp")
    digest_rate = offer_pool(carrier, window, range(window.num_blocks))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send((carrier.address, listener.getsockname(), digest_rate))
        bare, _ = listener.accept()
    memory, size = window.memory, _message_bytes(window)
    assert memory is not None
    while method := pipe.recv():
        for at in range(0, len(memory) // size * size, size):
            bare.sendall(memory[:size] if method == "bare_one_buffer" else memory[at : at + size])
    carrier.shutdown()
    bare.close()


def _run_receiver(pipe: Connection, shape: Shape, total_bytes: int, num_rounds: int) -> SocketFigures:
    torch.set_num_threads(1)
    window = shape.make_window(total_bytes, torch.device("cpu"))
    carrier = make_carrier(window, "tcp")
    if not pipe.poll(_TIMEOUT_S):
        raise TransferFailed("the sending process has not started")
    (host, port), bare_address, digest_rate = pipe.recv()
    bare = socket.create_connection(bare_address)
    endpoint = KvEndpoint(host, port, 0, len(window.heads))
    durations_s: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(num_rounds + 1):
        for method in METHODS:
            if method.startswith("bare"):
                pipe.send(method)
                durations_s[method].append(_receive_bare(bare, window, method == "bare_one_buffer"))
            else:
                is_checked = method == "carrier"
                durations_s[method].append(fetch(carrier, window, endpoint, window.num_blocks, is_checked))
    pipe.send("")
    carrier.shutdown()
    bare.close()
    size, total = _message_bytes(window), window.num_blocks * window.block_bytes(len(window.heads))
    moved = {method: total // size * size if method.startswith("bare") else total for method in METHODS}
    rates = {method: moved[method] / statistics.median(durations_s[method][1:]) for method in METHODS}
    return SocketFigures(shape, size, **rates, sender_digests=digest_rate)


def _message_bytes(window: PoolWindow) -> int:
    num_heads = len(window.heads)
    return HostTransport(window).message_blocks(num_heads) * window.block_bytes(num_heads)


def _receive_bare(sock: socket.socket, window: PoolWindow, is_one_buffer: bool) -> float:
    """Seconds, from when the sender was told."""
    memory, size = window.memory, _message_bytes(window)
    assert memory is not None
    start_s = time.perf_counter()
    for at in range(0, len(memory) // size * size, size):
        view = memory[:size] if is_one_buffer else memory[at : at + size]
        while len(view):
            view = view[sock.recv_into(view) :]
    return time.perf_counter() - start_s
