"""The cost of moving KV blocks: the kernels alone, NCCL alone, and fetches by each transport between two processes.

The sender is a child process that holds a pool of random blocks, the receiver is this process; on a machine with two
GPUs each uses one. Times are medians; rates count each moved byte once.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

import torch
from torch import Tensor

from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import KvEndpoint
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.block_sink import BlockSink, FinishCopy
from tensorweave.workers.transfer.carrier import ReadFailed, TicketReleased
from tensorweave.workers.transfer.carriers.tcp import TcpCarrier
from tensorweave.workers.transfer.expected_rate import DIRECT
from tensorweave.workers.transfer.read_request import BlockHeader, ReadRequest
from tensorweave.workers.transfer.receiving.block_receiver import BlockReceiver, TargetBlocks
from tensorweave.workers.transfer.sending.offered_blocks import BlockGenerations, OfferedBlocks
from tensorweave.workers.transfer.transfer_stats import TransferStats
from tensorweave.workers.transfer.transports.direct import DirectTransport
from tensorweave.workers.transfer.transports.host import HostTransport
from tensorweave.workers.transfer.transports.nccl import Communicator, new_unique_id
from tensorweave.workers.transfer.transports.nccl_transport import MESSAGE_BYTES, NcclTransport
from tensorweave.workers.transfer.transports.same_node import SameNodeTransport
from tensorweave.workers.transfer.transports.transport import Transport
from tensorweave.workers.transfer.window import PoolWindow, RunningCopy

_SECRET: Final = "bench"
_TICKET: Final = "ticket"
_PROMPT: Final = "prompt"
_HOST: Final = "127.0.0.1"
_TIMEOUT_S: Final = 60.0
_SMALL_MESSAGE_BYTES: Final = 64 << 10

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """The KV of one rank."""

    name: str
    num_layers: int
    num_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    tokens_per_block: int = 32
    first_head: int = 0

    def make_window(self, num_bytes: int, device: torch.device, transport: str = "") -> PoolWindow:
        dtype = getattr(torch, self.dtype)
        token_bytes = self.num_layers * 2 * self.num_heads * self.head_dim * dtype.itemsize
        num_blocks = max(1, num_bytes // (token_bytes * self.tokens_per_block))
        P, H = self.tokens_per_block, self.head_dim
        pool = KVPool(self.num_layers, num_blocks, self.num_heads, P, H, dtype, device, self.first_head)
        pool.cache.normal_()
        return PoolWindow(pool, is_direct=transport == DIRECT)


SHAPES: Final = {shape.name: shape for shape in (Shape("smollm2-135m", 30, 3, 64), Shape("llama-8b", 32, 8, 128))}


def bench_fetches(
    shape: Shape, transport: str, devices: tuple[str, str], sizes: Sequence[int], message_bytes: int, num_runs: int
) -> list[Figures]:
    """Whole fetches of `sizes` bytes, from the read request to the last block in the pool, with digests checked and
    not."""
    with running_sender(shape, transport, devices[0], max(sizes), message_bytes) as sender:
        window = shape.make_window(max(sizes), torch.device(devices[1]), transport)
        carrier = make_carrier(window, transport, message_bytes)
        rows = []
        for size in sizes:
            num_blocks = max(1, size // window.block_bytes(len(window.heads)))
            num_bytes = num_blocks * window.block_bytes(len(window.heads))
            row = {
                "shape": shape.name,
                "transport": transport,
                "message_mib": message_bytes / 2**20,
                "mib": num_bytes / 2**20,
            }
            for name, is_checked in (("unchecked", False), ("checked", True)):
                times = [fetch(carrier, window, sender.endpoint, num_blocks, is_checked) for _ in range(num_runs + 1)][
                    1:
                ]
                row[f"{name}_ms"] = statistics.median(times) * 1e3
                row[f"{name}_gb_per_s"] = num_bytes / statistics.median(times) / 1e9
            rows.append({**row, "sender_digest_gb_per_s": sender.digest_bytes_per_s / 1e9})
        carrier.shutdown()
        return rows


def bench_kernels(shape: Shape, device: str, num_bytes: int, num_runs: int) -> Figures:
    """GB/s of packing, unpacking and digesting scattered blocks; each call includes its launch and its wait."""
    window = shape.make_window(num_bytes, torch.device(device))
    heads = range(len(window.heads))
    order = torch.randperm(window.num_blocks).tolist()
    packed = torch.empty(len(order) * window.block_bytes(len(heads)), dtype=torch.uint8, device=window.device)
    full = [window.tokens_per_block] * len(order)
    calls: dict[str, Callable[[], Any]] = {
        "pack": lambda: window.pack(order, heads, packed),
        "unpack": lambda: window.unpack(order, heads, packed),
        "digest_in_pool": lambda: window.digests(order, full),
        "digest_packed": lambda: window.payload_digests(packed, len(heads), full),
    }
    rates = {f"{name}_gb_per_s": len(packed) / _median_s(call, num_runs) / 1e9 for name, call in calls.items()}
    return {"shape": shape.name, "mib": len(packed) / 2**20, **rates}


def bench_wire(sizes: Sequence[int], num_runs: int) -> list[Figures]:
    """GB/s between two GPUs of this process, over NCCL and by copies, of whole sizes and of pieces of 64 KiB."""
    unique_id = new_unique_id()
    times: list[list[float]] = [[], []]

    def run_rank(rank: int) -> None:
        torch.cuda.set_device(rank)
        torch.cuda.set_stream(torch.cuda.Stream(rank))  # type: ignore[no-untyped-call]
        data = torch.empty(max(sizes), dtype=torch.uint8, device="cuda")
        pair = Communicator(unique_id, rank, _TIMEOUT_S, lambda: False)
        move = pair.receive if rank else pair.send
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        for size in sizes:
            for message in (size, _SMALL_MESSAGE_BYTES):
                pieces = [data[at : at + message] for at in range(0, size, message)]
                for _ in range(num_runs + 1):
                    start_s = time.perf_counter()
                    for piece in pieces:
                        move(piece, _TIMEOUT_S)
                    done.record()
                    pair.wait(done, _TIMEOUT_S)
                    times[rank].append(time.perf_counter() - start_s)
        pair.abort()

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = []
    for index, size in enumerate(sizes):
        whole, pieces = (times[1][(2 * index + i) * (num_runs + 1) :][1 : num_runs + 1] for i in (0, 1))
        seconds = {
            "nccl": statistics.median(whole),
            "nccl_64_kib": statistics.median(pieces),
            "copy": _copy_s(size, size, num_runs),
            "copy_64_kib": _copy_s(size, _SMALL_MESSAGE_BYTES, num_runs),
        }
        rows.append({"mib": size / 2**20, **{f"{name}_gb_per_s": size / s / 1e9 for name, s in seconds.items()}})
    return rows


def _copy_s(size: int, message: int, num_runs: int) -> float:
    source, target = (torch.empty(size, dtype=torch.uint8, device=f"cuda:{number}") for number in (0, 1))

    def copy() -> None:
        for at in range(0, size, message):
            target[at : at + message].copy_(source[at : at + message], non_blocking=True)
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)

    return _median_s(copy, num_runs)


def gpu_names() -> list[str]:
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


class UncheckedSink:
    """A `BlockSink` that verifies nothing, so that only the transport and the copies are measured."""

    def __init__(self, target: TargetBlocks, heads: range) -> None:
        self._target = target
        self._heads = heads

    def announce(self, headers: Sequence[BlockHeader], digests: bytes) -> None:
        return None

    def put(self, blocks: Sequence[tuple[int, int]], payload: Tensor) -> None:
        self._target.window.unpack([index for index, _ in blocks], self._heads, payload)

    def pull(self, part: BlockPart, pool_LB2KPH: Tensor, heads: range) -> FinishCopy:
        copy = self._target.pull(part, pool_LB2KPH, heads, self._heads)
        assert copy is not None, "the benchmark's fetch was closed"
        return partial(self._end, copy)

    def _end(self, copy: RunningCopy) -> None:
        self._target.end_copy(copy)


def fetch(carrier: TcpCarrier, window: PoolWindow, endpoint: KvEndpoint, num_blocks: int, is_checked: bool) -> float:
    """Fetch the last blocks of the sender's pool; return the seconds until all are in ours. Raises TransferFailed."""
    heads, first = range(len(window.heads)), window.num_blocks - num_blocks
    target = TargetBlocks(window, 0, range(window.num_blocks))
    wanted = dict.fromkeys(range(first, window.num_blocks), window.tokens_per_block)
    receiver = BlockReceiver(target, heads, wanted, TransferStats())
    sink: BlockSink = receiver if is_checked else UncheckedSink(target, heads)
    read_id = uuid.uuid4().hex
    request = ReadRequest(read_id, _TICKET, {}, _PROMPT, window.heads.start, len(heads), first)
    start_s = time.perf_counter()
    carrier.fetch(endpoint, _SECRET, request, sink)
    while True:
        for event in carrier.poll(_TIMEOUT_S) or [ReadFailed(read_id, "timeout", f"not within {_TIMEOUT_S:g} s")]:
            if isinstance(event, TicketReleased) or event.read_id != read_id:
                continue
            if isinstance(event, ReadFailed):
                raise TransferFailed(f"the benchmark's fetch failed: {event.kind}: {event.reason}")
            duration_s = time.perf_counter() - start_s
            carrier.close(_TICKET)
            if is_checked and receiver.take_missing():
                raise TransferFailed("the benchmark's fetch has received wrong blocks")
            return duration_s


def offer_pool(carrier: TcpCarrier, window: PoolWindow, block_ids: Sequence[int]) -> float:
    """Offer these blocks to `fetch`; return at how many bytes per second they were digested."""
    offered = OfferedBlocks(window, BlockGenerations(), _PROMPT)
    start_s = time.perf_counter()
    offered.add(block_ids, [window.tokens_per_block] * len(block_ids))
    duration_s = time.perf_counter() - start_s
    offered.complete(0)
    carrier.offer(_TICKET, offered)
    return len(block_ids) * window.block_bytes(len(window.heads)) / duration_s


def make_carrier(window: PoolWindow, transport: str, message_bytes: int = MESSAGE_BYTES) -> TcpCarrier:
    return TcpCarrier(window, {}, _HOST, _SECRET, [_make_transport(transport, window, message_bytes)])


def _make_transport(name: str, window: PoolWindow, message_bytes: int) -> Transport:
    if window.device.type == "cuda":
        torch.cuda.set_device(window.device)
        window.warm()
    match name:
        case "ipc_direct":
            return DirectTransport(window, message_bytes)
        case "ipc":
            return SameNodeTransport(window, message_bytes)
        case "nccl":
            return NcclTransport(window, message_bytes)
        case "tcp":
            return HostTransport(window)
    raise ValueError(f"no transport {name!r}")


@dataclass(frozen=True, slots=True)
class Sender:
    endpoint: KvEndpoint
    digest_bytes_per_s: float
    process: BaseProcess


@contextmanager
def running_sender(
    shape: Shape, transport: str, device: str, num_bytes: int, message_bytes: int = MESSAGE_BYTES
) -> Iterator[Sender]:
    """Another process that offers a pool's blocks."""
    context = multiprocessing.get_context("spawn")
    pipe, child_pipe = context.Pipe()
    arguments = (child_pipe, shape, transport, device, num_bytes, message_bytes)
    process = context.Process(target=_run_sender, args=arguments, daemon=True)
    process.start()
    child_pipe.close()
    try:
        if not pipe.poll(_TIMEOUT_S):
            raise TransferFailed("the benchmark's sender has not started")
        endpoint, digest_bytes_per_s = pipe.recv()
        yield Sender(endpoint, digest_bytes_per_s, process)
    finally:
        pipe.close()
        process.join(_TIMEOUT_S)
        process.kill()


def _run_sender(
    pipe: Connection, shape: Shape, transport: str, device: str, num_bytes: int, message_bytes: int
) -> None:
    window = shape.make_window(num_bytes, torch.device(device), transport)
    carrier = make_carrier(window, transport, message_bytes)
    rate = offer_pool(carrier, window, torch.randperm(window.num_blocks).tolist())
    pipe.send((KvEndpoint(*carrier.address, window.heads.start, len(window.heads)), rate))
    pipe.poll(None)  # until the other end closes
    carrier.shutdown()


def _median_s(call: Callable[[], Any], num_runs: int) -> float:
    call()
    times = []
    for _ in range(num_runs):
        start_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)
