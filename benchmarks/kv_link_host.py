"""The host's side of fetches by `ipc_direct`, on a CPU: the real path between two processes, with copies that take no
time.

    python benchmarks/kv_link_host.py [message blocks …]

A fetch has the blocks, layers and heads of 250 MB of an 8B model's KV (119 blocks of 16 tokens, 32 layers, 8 heads);
only the head dimension is small. The stand-in for the copy looks the digests up that a copy would find.
"""

from __future__ import annotations

import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.kernels.blocks.reference import SomeBlocks
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.transfer.carrier import ReadDone, ReadFailed
from tensorweave.workers.transfer.carriers.tcp import TcpCarrier
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.receiving.block_receiver import BlockReceiver, TargetBlocks
from tensorweave.workers.transfer.sending.offered_blocks import BlockGenerations, OfferedBlocks
from tensorweave.workers.transfer.transfer_stats import TransferStats
from tensorweave.workers.transfer.transports.direct import DirectTransport
from tensorweave.workers.transfer.window import PoolWindow, RunningCopy

LAYERS, HEADS, TOKENS, BLOCKS = 32, 8, 16, 119
FETCH_BYTES = 250e6
RUNS = 60


class FreeCopies(PoolWindow):
    """Both processes have pools of the same content. `pull` copies nothing."""

    def __init__(self) -> None:
        pool = KVPool(LAYERS, BLOCKS, HEADS, TOKENS, 4, torch.bfloat16, torch.device("cpu"))
        pool.cache.copy_(torch.randn(pool.cache.shape, generator=torch.Generator().manual_seed(1)))
        super().__init__(pool)
        self.table_NLK: npt.NDArray[np.int64] = self.digests(range(BLOCKS), [TOKENS] * BLOCKS).numpy()

    def pull(
        self, source: SomeBlocks, block_ids: Sequence[int], heads: range, num_tokens: Sequence[int], layers: range
    ) -> RunningCopy:
        found_NLK = self.table_NLK[source.block_ids, layers.start : layers.stop]
        return RunningCopy(torch.from_numpy(found_NLK), None)


class SameContent:
    """Satisfies `PeerMemory`."""

    def share(self, window: PoolWindow) -> dict[str, Any]:
        return {}

    def map(self, handshake: dict[str, Any], window: PoolWindow) -> Tensor | None:
        return window.blocks_LB2KPH


def make_carrier(window: PoolWindow, message_blocks: int) -> TcpCarrier:
    transport = DirectTransport(window, message_blocks * window.block_bytes(HEADS), SameContent())
    return TcpCarrier(window, {}, "127.0.0.1", "bench", [transport])


def run_sender(pipe: Connection, message_blocks: int) -> None:
    sys.setswitchinterval(0.001)  # as ranks do
    window = FreeCopies()
    carrier = make_carrier(window, message_blocks)
    offered = OfferedBlocks(window, BlockGenerations(), "prompt")
    offered.add(torch.randperm(BLOCKS).tolist(), [TOKENS] * BLOCKS)
    offered.complete(0)
    carrier.offer("ticket", offered)
    pipe.send(KvEndpoint(*carrier.address, 0, HEADS))
    while pipe.poll(60) and pipe.recv():
        pipe.send(time.process_time())
    carrier.shutdown()


def fetch_many(carrier: TcpCarrier, window: PoolWindow, endpoint: KvEndpoint, count: int) -> float:
    receivers, open_reads, start_s = [], set(), time.perf_counter()
    for _ in range(count):
        target = TargetBlocks(window, 0, range(BLOCKS))
        receivers.append(BlockReceiver(target, range(HEADS), dict.fromkeys(range(BLOCKS), TOKENS), TransferStats()))
        request = ReadRequest(uuid.uuid4().hex, "ticket", {}, "prompt", 0, HEADS, 0)
        open_reads.add(request.read_id)
        carrier.fetch(endpoint, "bench", request, receivers[-1])
    while open_reads:
        for event in carrier.poll(20.0):
            assert not isinstance(event, ReadFailed), event
            if isinstance(event, ReadDone):
                open_reads.discard(event.read_id)
    duration_s = time.perf_counter() - start_s
    carrier.close("ticket")
    assert not any(receiver.take_missing() for receiver in receivers), "wrong blocks"
    return duration_s


def time_fetches(message_blocks: int) -> None:
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=run_sender, args=(theirs, message_blocks), daemon=True)
    process.start()
    assert pipe.poll(60), "the sender does not start"
    endpoint, window = pipe.recv(), FreeCopies()
    carrier = make_carrier(window, message_blocks)
    fetch_many(carrier, window, endpoint, 2)
    for count in (1, 8):
        cpu_s = [time.process_time(), sender_cpu_s(pipe)]
        times = [fetch_many(carrier, window, endpoint, count) / count for _ in range(RUNS)]
        cpu_s = [time.process_time() - cpu_s[0], sender_cpu_s(pipe) - cpu_s[1]]
        ours_us, theirs_us = (seconds / RUNS / count * 1e6 for seconds in cpu_s)
        best_s, median_s = min(times), statistics.median(times)
        print(
            f"messages of {message_blocks} blocks, {count} at once, us per fetch: {median_s * 1e6:.0f} (least "
            f"{best_s * 1e6:.0f}); processor time of the receiver {ours_us:.0f}, of the sender {theirs_us:.0f}; "
            f"with free copies {FETCH_BYTES / median_s / 1e9:.0f} GB/s",
            flush=True,
        )
    pipe.send(False)
    carrier.shutdown()
    process.join(10)


def sender_cpu_s(pipe: Connection) -> float:
    pipe.send(True)
    assert pipe.poll(60), "the sender does not answer"
    seconds: float = pipe.recv()
    return seconds


if __name__ == "__main__":
    sys.setswitchinterval(0.001)
    torch.set_num_threads(1)
    for blocks in map(int, sys.argv[1:] or ["8", "32", "512"]):
        time_fetches(blocks)
