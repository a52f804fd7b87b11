"""KV between two GPUs of one host: rates, the price to decode steps beside a copy, and how soon decoding begins.

    python benchmarks/gpu_kv_link.py [kernel] [fetches] [price] [handover]

`kernel`: the copy alone, by multiprocessors and block size. `fetches`: through the transfer layer, sender and receiver
in two processes, one fetch at a time and several. `price`: decode steps of an 8B model, of our kernels, with copies
beside them. `handover`: two executors of an 8B shape with random weights; from the end of a prompt's step on the GPU to
the launch of the first decode at the other.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from gpu_timing import median_ms

from tensorweave.cli.bench_transfer_fetches import Shape, make_carrier, running_sender
from tensorweave.cli.suite_shapes import LLAMA_8B
from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import GenerateRequest, KvSource, SamplingSpec, Ticket
from tensorweave.kernels.blocks.cuda_pull import pull_blocks
from tensorweave.kernels.blocks.reference import SomeBlocks
from tensorweave.workers.transfer.carrier import ReadDone, ReadFailed
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.receiving.block_receiver import BlockReceiver, TargetBlocks
from tensorweave.workers.transfer.transfer_stats import TransferStats

BYTES = 250_000_000
SMS = (4, 6, 8, 10, 12, 16, 24)
Lines = Iterator[str]


def open_peer_access() -> None:
    """A copy opens it in one way only."""
    for one, other in ((0, 1), (1, 0)):
        torch.zeros(1, device=f"cuda:{one}").copy_(torch.zeros(1, device=f"cuda:{other}"))
    torch.cuda.synchronize()


class Pull:
    """Copies of random blocks from one GPU's pool into the other's."""

    def __init__(self, tokens_per_block: int, source: str, target: str) -> None:
        pools = [
            torch.randn(32, 250, 2, 8, tokens_per_block, 128, device=gpu, dtype=torch.bfloat16)
            for gpu in (source, target)
        ]
        self.count = BYTES // pools[0][:, 0].nbytes
        self.num_bytes = self.count * pools[0][:, 0].nbytes
        ids = [torch.randperm(250).tolist()[: self.count] for _ in pools]
        self.source, self.target = (SomeBlocks(pool, i, range(8)) for pool, i in zip(pools, ids, strict=True))
        self.tokens = [tokens_per_block] * self.count
        self.digests = torch.zeros(self.count, 32, 8, dtype=torch.int64, pin_memory=True)

    def launch(self, num_sms: int) -> None:
        pull_blocks(self.source, self.target, self.tokens, self.digests, num_sms)


def time_kernel() -> Lines:
    open_peer_access()
    torch.cuda.set_device(1)
    for tokens_per_block in (16, 32):
        pull = Pull(tokens_per_block, "cuda:0", "cuda:1")
        rates = [f"{n}: {pull.num_bytes / median_ms(partial(pull.launch, n)) / 1e6:.0f}" for n in SMS]
        target, source = (blocks.pool_LB2KPH[0] for blocks in (pull.target, pull.source))
        rates.append(f"copy engine: {source.nbytes / median_ms(partial(target.copy_, source)) / 1e6:.0f}")
        yield f"kernel, pieces of {tokens_per_block * 4} KiB, GB/s by SMs: {', '.join(rates)}"
    torch.cuda.set_device(0)


# ---- through the transfer layer


def fetch_many(carrier: Any, window: Any, endpoint: Any, num_blocks: int, count: int) -> float:
    """`count` fetches of the same blocks into blocks of their own; return the seconds until all are verified."""
    heads, receivers, open_reads = range(len(window.heads)), [], set()
    for number in range(count):
        ids = [(number * num_blocks + i) % window.num_blocks for i in range(num_blocks)]
        wanted = dict.fromkeys(range(num_blocks), window.tokens_per_block)
        receivers.append(BlockReceiver(TargetBlocks(window, 0, ids), heads, wanted, TransferStats()))
    requests = [
        ReadRequest(uuid.uuid4().hex, "ticket", {}, "prompt", 0, len(heads), 0, tuple(range(num_blocks)))
        for _ in receivers
    ]
    start_s = time.perf_counter()
    for request, receiver in zip(requests, receivers, strict=True):
        open_reads.add(request.read_id)
        carrier.fetch(endpoint, "bench", request, receiver)
    while open_reads:
        for event in carrier.poll(20.0) or [ReadFailed("", "timeout", "not within 20 s")]:
            if isinstance(event, ReadFailed):
                raise TransferFailed(event.reason)
            if isinstance(event, ReadDone):
                open_reads.discard(event.read_id)
    duration_s = time.perf_counter() - start_s
    carrier.close("ticket")
    assert not any(receiver.take_missing() for receiver in receivers), "wrong blocks"
    return duration_s


FETCHES = [("ipc", 16, 64), ("ipc_direct", 16, 1024), ("ipc_direct", 16, 64), ("ipc", 32, 64), ("ipc_direct", 32, 1024)]
"""Transports, tokens of a block, MiB of a message."""


def time_fetches() -> Lines:
    sys.setswitchinterval(0.001)  # as ranks do
    torch.cuda.set_device(1)
    for transport, tokens_per_block, message_mib in FETCHES:
        shape = Shape("llama-8b", 32, 8, 128, tokens_per_block=tokens_per_block)
        with running_sender(shape, transport, "cuda:0", BYTES, message_mib << 20) as sender:
            window = shape.make_window(4 * BYTES, torch.device("cuda:1"), transport)
            num_blocks = BYTES // window.block_bytes(8)
            num_bytes = num_blocks * window.block_bytes(8)
            carrier = make_carrier(window, transport, message_mib << 20)
            for num_sms in (8, 12, 16) if transport == "ipc_direct" and message_mib == 1024 else (12,):
                window.copy_sms = num_sms
                rates = []
                for count in (1, 2, 4, 8):
                    times = [fetch_many(carrier, window, sender.endpoint, num_blocks, count) for _ in range(12)][2:]
                    rates.append(f"{count} at once {count * num_bytes / statistics.median(times) / 1e9:.0f}")
                setting = f"{transport}, {tokens_per_block * 4} KiB, messages of {message_mib} MiB, {num_sms} SMs"
                yield f"fetches of {num_bytes / 1e6:.0f} MB in {setting}, GB/s: {', '.join(rates)}"
            carrier.shutdown()
    torch.cuda.set_device(0)


# ---- beside decode steps


def time_price() -> Lines:
    from gpu_model import make_model  # needs a GPU that compiles Triton's kernels
    from gpu_step import DecodeStep

    open_peer_access()
    model = make_model(2048)
    caches = torch.randn(32, 1200, 16, 32, 128, device="cuda", dtype=torch.bfloat16)
    pull, stream = Pull(16, "cuda:1", "cuda:0"), torch.cuda.Stream(priority=-1)
    for num_rows in (1, 32):
        step = DecodeStep(model, caches, num_rows, 1024, is_thin=True)
        step.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.run()
        alone_ms = median_ms(graph.replay)
        parts = []
        for num_sms in SMS:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            with torch.cuda.stream(stream):
                begun.record()
                num_pulls = 60
                for _ in range(num_pulls):
                    pull.launch(num_sms)
                ended.record()
            beside_ms = median_ms(graph.replay, 5)
            torch.cuda.synchronize()
            rate = num_pulls * pull.num_bytes / begun.elapsed_time(ended) / 1e6
            parts.append(f"{num_sms}: {beside_ms:.2f} ({(beside_ms / alone_ms - 1) * 100:+.0f} %) at {rate:.0f} GB/s")
        yield f"decode step of {num_rows} rows, {alone_ms:.2f} ms alone; beside copies, ms by SMs: {'; '.join(parts)}"


# ---- from the end of a prompt to the first decode


def serve(pipe: Connection, path: str) -> None:
    """An executor in a process of its own; notes when the GPU has ended a step with a prompt, and when decodes are
    launched."""
    from tensorweave.cluster.llm_args import TorchLlmArgs
    from tensorweave.workers.build import build_executor
    from tensorweave.workers.engine.device.engine import DeviceEngine
    from tensorweave.workers.gang.comm import SoloComm

    sys.setswitchinterval(0.001)  # as ranks do
    ends: list[float] = []
    launches: list[tuple[float, list[str]]] = []
    launch = DeviceEngine.launch

    def noted(self: Any, batch: Any, *arguments: Any) -> Any:
        if batch.generation:
            launches.append((time.monotonic(), [row.request.request_id for row in batch.generation]))
        result = launch(self, batch, *arguments)
        if batch.context:
            event = torch.cuda.Event()
            event.record()
            threading.Thread(target=lambda: (event.synchronize(), ends.append(time.monotonic()))).start()
        return result

    DeviceEngine.launch = noted  # type: ignore[method-assign]
    args = TorchLlmArgs(
        model=path, dtype="bfloat16", load_format="dummy", device="cuda", max_batch_size=16, max_seq_len=4096,
        kv_cache_config={"max_tokens": 65536, "tokens_per_block": 32, "enable_block_reuse": False},
        cuda_graph_config={"batch_sizes": [1, 8, 16]}, cache_transceiver_config={"backend": "IPC_DIRECT"},
    )  # fmt: skip
    executor = build_executor(args, SoloComm(), transfer_secret="bench")
    executor.start()
    pipe.send((executor.kv_endpoint, executor.kv_fingerprint))
    while True:
        verb, argument = pipe.recv()
        if verb == "add":
            executor.enqueue_request(argument)
        elif verb == "wait":
            left, end_s = set(argument), time.monotonic() + 30
            while left and time.monotonic() < end_s:
                for chunk in executor.await_responses(timeout_s=0.05):
                    if chunk.is_last:
                        left.discard(chunk.request_id)
            pipe.send((list(left), executor.gauges()))
        elif verb == "times":
            pipe.send((list(ends), list(launches)))
        else:
            return


class ExecutorPair:
    """Prefill on the first GPU, decode on the second."""

    def __init__(self, path: str) -> None:
        context = get_context("spawn")
        self.pipes, self.processes = [], []
        for gpu in "01":
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(theirs, path), daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)
        del os.environ["CUDA_VISIBLE_DEVICES"]
        (endpoint, fingerprint), _ = (receive(pipe, 100.0) for pipe in self.pipes)
        self.source = KvSource("P", (endpoint,), fingerprint, "bench")

    def add_steady(self, count: int) -> None:
        for i in range(count):
            self.pipes[1].send(("add", GenerateRequest(f"steady{i}", [5 + i] * 50, SamplingSpec(max_tokens=2500))))
        time.sleep(0.5)

    def hand_over(self, name: str, prompt: list[int]) -> tuple[float, float, dict[str, float]]:
        """ms from asking to the end of the prompt's step, ms from there to the first decode's launch, and gauges."""
        ids, sampling, asked_s = (f"{name}p", f"{name}d"), SamplingSpec(max_tokens=3), time.monotonic()
        fetch = Ticket(name, self.source)
        self.pipes[1].send(("add", GenerateRequest(ids[1], prompt, sampling, fetch=fetch)))
        self.pipes[0].send(("add", GenerateRequest(ids[0], prompt, sampling, offer=name)))
        for pipe, request_id in zip(self.pipes, ids, strict=True):
            pipe.send(("wait", [request_id]))
        (left, _), (also_left, gauges) = (receive(pipe, 40.0) for pipe in self.pipes)
        assert not left + also_left, "not answered in time"
        for pipe in self.pipes:
            pipe.send(("times", None))
        (ends, _), (_, launches) = (receive(pipe, 10.0) for pipe in self.pipes)
        first_s = next(at for at, request_ids in launches if ids[1] in request_ids)
        return (ends[-1] - asked_s) * 1e3, (first_s - ends[-1]) * 1e3, gauges

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(("end", None))
        for process in self.processes:
            process.join(5)
            process.kill()


def time_handover() -> Lines:
    with tempfile.TemporaryDirectory() as folder:
        begun_s = time.monotonic()
        pair = ExecutorPair(str(LLAMA_8B.write(Path(folder), "bfloat16")))
        yield f"both executors are ready after {time.monotonic() - begun_s:.0f} s"
        draw, jitter = torch.Generator().manual_seed(5), random.Random(5)
        for num_beside, length in ((0, 2000), (0, 1000), (8, 2000)):
            pair.add_steady(num_beside)
            rows = []
            for number in range(22):
                time.sleep(0.05 + jitter.random() * 0.01)  # else prompts keep step with the decodes
                prompt = torch.randint(10, 120000, (length,), generator=draw).tolist()
                rows.append(pair.hand_over(f"{num_beside}-{length}-{number}-", prompt))
            gaps, gauges = sorted(gap for _, gap, _ in rows[2:]), rows[-1][2]
            failures = {name: count for name, count in gauges.items() if "failures" in name and count}
            yield (
                f"{length} tokens beside {num_beside} decodes: prompt computed {rows[-1][0]:.1f} ms after asking; "
                f"from there to the first decode's launch, ms: {[round(gap, 2) for gap in gaps]}; "
                f"recomputed {gauges['kv_transfer_recomputed_tokens_total']:.0f}, failures {failures}"
            )
        pair.close()


def receive(pipe: Connection, timeout_s: float) -> Any:
    assert pipe.poll(timeout_s), "a process does not answer"
    return pipe.recv()


PARTS: dict[str, Callable[[], Lines]] = {
    "kernel": time_kernel,
    "fetches": time_fetches,
    "price": time_price,
    "handover": time_handover,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"(default: all of {', '.join(PARTS)})")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no parts {unknown}; there are {list(PARTS)}")
    for part in parts:
        for line in PARTS[part]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
