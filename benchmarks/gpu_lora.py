"""What adapters cost on one GPU: a decode step of Llama-3.1-8B's shape with 8 adapters of rank 16 in all linear layers,
beside that of an engine without adapters, by the graphs that serve: ms.

    python benchmarks/gpu_lora.py [--rows 1 16 64 256] [--rank 16] [--adapters 8]

Random weights, bfloat16, 256 tokens of context, 2 rows of `rows` without an adapter.
"""

# ruff: noqa: B023 (launches are timed before the loop goes on)

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_timing import median_ms, median_us

from tensorweave.cli.suite_shapes import LLAMA_8B
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.kernels.lora.reference import UpdatePart
from tensorweave.workers.engine.device.adapter_places import AdapterPlaces, HostAdapter, NoAdapterPlaces
from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.engine.device.warm_up import OneBlock
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.step.adapter import RankAdapter
from tensorweave.workers.step.pending import NothingPending
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState

CONTEXT = 256


def open_engine(folder: Path, rows: Sequence[int], **more: Any) -> DeviceEngine:
    args = TorchLlmArgs(
        model=str(folder), load_format="dummy", device="cuda", dtype="bfloat16", max_batch_size=max(rows),
        max_num_tokens=1024, max_seq_len=2048, kv_cache_config={"max_tokens": 4096},
        cuda_graph_config={"batch_sizes": list(rows)}, **more,
    )  # fmt: skip
    engine = load_engine(args, SoloComm())
    assert isinstance(engine, DeviceEngine)
    return engine


def random_adapters(engine: DeviceEngine, count: int, rank: int) -> list[RankAdapter]:
    stacks = engine._adapters.stacks
    found = []
    for number in range(count):
        sites = []
        for stack in stacks:
            starts = (0, *stack.bounds)
            ends = (*stack.bounds, len(stack.b_NLR))
            inputs = stack.a_PLRK.shape[3]
            parts = [
                UpdatePart(
                    torch.randn(rank, inputs).mul(0.01).bfloat16(), torch.randn(e - s, rank).mul(0.01).bfloat16(), s
                )
                for s, e in zip(starts, ends, strict=True)
            ]
            sites.append(tuple(parts))
        found.append(RankAdapter(bytes([number]), HostAdapter(tuple(sites))))
    return found


def step_ms(engine: DeviceEngine, rows: int, adapters: Sequence[RankAdapter]) -> float:
    """Of the graph of a step of so many decodes, replayed."""
    requests = [LlmRequest(f"r{i}", i, [1] * CONTEXT, CONTEXT, SamplingSpec(max_tokens=2)) for i in range(rows)]
    for i, request in enumerate(requests):
        request.state = RequestState.GENERATION
        request.num_launched = request.num_computed = CONTEXT - 1
        if adapters and (rows == 1 or i < rows - 2):
            request.adapter = adapters[i % len(adapters)]
    batch = ScheduledBatch((), tuple(StepRow.of_decode(request) for request in requests))
    engine.launch(batch, OneBlock(engine.info.tokens_per_block), NothingPending())  # type: ignore[arg-type]
    torch.cuda.synchronize()
    ms = median_ms(lambda: engine.graphs.run(rows), 21)
    for request in requests:
        for manager in engine.resource_managers:
            manager.free_resources(request)
    return ms


def time_kernels(engine: DeviceEngine) -> None:
    """Shrink and expand of each product of a layer at 64 rows with 8 adapters, and with none."""
    from tensorweave.kernels.lora.triton import add_updates

    adapters = engine._adapters
    assert isinstance(adapters, AdapterPlaces)
    for name, site in zip(("qkv", "o", "gate_up", "down"), range(4), strict=True):
        stacks = list(adapters.stacks)[site::4]
        x = torch.randn(64, stacks[0].a_PLRK.shape[3], device="cuda").bfloat16()
        out = torch.randn(64, len(stacks[0].b_NLR), device="cuda").bfloat16()
        mixed = torch.arange(64, dtype=torch.int32, device="cuda") % 8
        none = torch.full_like(mixed, -1)
        us = [median_us([lambda s=s, p=p: add_updates(x, p, s, out, pdl=True) for s in stacks]) for p in (mixed, none)]
        print(f"{name:8s} 64 rows: {us[0]:.1f} µs with 8 adapters, {us[1]:.1f} with none", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    options = parser.parse_args()
    print(torch.cuda.get_device_name())
    with tempfile.TemporaryDirectory() as folder:
        LLAMA_8B.write(Path(folder), "bfloat16")
        base = open_engine(Path(folder), options.rows)
        assert isinstance(base._adapters, NoAdapterPlaces)
        plain = {rows: step_ms(base, rows, ()) for rows in options.rows}
        del base
        gc.collect()
        torch.cuda.empty_cache()
        lora = {"max_lora_rank": options.rank, "max_loras": options.adapters}
        engine = open_engine(Path(folder), options.rows, enable_lora=True, lora_config=lora)
        adapters = random_adapters(engine, options.adapters, options.rank)
        for rows in options.rows:
            none, mixed = step_ms(engine, rows, ()), step_ms(engine, rows, adapters)
            print(
                f"{rows:4d} rows: without adapters {plain[rows]:.3f} ms; an engine for adapters {none:.3f} with none, "
                f"{mixed:.3f} with {options.adapters} of rank {options.rank}: {plain[rows] / mixed:.2f} x",
                flush=True,
            )
        time_kernels(engine)


if __name__ == "__main__":
    main()
