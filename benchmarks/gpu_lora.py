"""What adapters cost on one GPU: a decode step of Llama-3.1-8B's shape with 8 adapters of rank 16 in all linear layers,
beside that of an engine without adapters, by the graphs that serve: ms.

    python benchmarks/gpu_lora.py [--rows 1 16 64 256] [--rank 16] [--adapters 8] [--forms]

Random weights, bfloat16, 256 tokens of context, 2 rows of `rows` without an adapter.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from gpu_timing import DEVICE, median_ms, median_us
from torch import Tensor

from tensorweave.cli.suite_shapes import LLAMA_8B
from tensorweave.cli.trace_events import KERNEL, of_kind
from tensorweave.cli.trace_profiler import prepare, recording
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.kernels.linear.thin_tiling import GATED, PLAIN, RESIDUAL
from tensorweave.kernels.linear.triton_thin import ResidualSum, SplitWorkspace, thin_linear
from tensorweave.kernels.lora.cuda_shrink import ShrinkWorkspace, shrink
from tensorweave.kernels.lora.reference import UpdatePart
from tensorweave.kernels.lora.triton import add_updates
from tensorweave.kernels.lora.update import LowRankUpdate
from tensorweave.workers.engine.device.adapter_places import HostAdapter, NoAdapterPlaces
from tensorweave.workers.engine.device.engine import DeviceEngine, StepSize
from tensorweave.workers.engine.device.graphs import AdaptedRows
from tensorweave.workers.engine.device.warm_up import OneBlock
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.device import thin_updates
from tensorweave.workers.models.device.mlp import DeviceMlp
from tensorweave.workers.models.device.steps import DecodeSteps
from tensorweave.workers.models.device.thin import ThinLayers
from tensorweave.workers.models.device.thin_mlp import ThinTilings
from tensorweave.workers.step.adapter import RankAdapter
from tensorweave.workers.step.pending import NothingPending
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState

CONTEXT = 256


def open_engine(folder: Path, rows: Sequence[int], **more: Any) -> DeviceEngine:
    args = TorchLlmArgs(
        model=str(folder), load_format="dummy", device="cuda", dtype="bfloat16", max_batch_size=max(rows),
        max_num_tokens=1024, max_seq_len=2048, kv_cache_config={"max_tokens": 4096},
        cuda_graph_config={"batch_sizes": sorted(rows)}, **more,
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
    size = AdaptedRows(rows) if adapters else rows
    ms = median_ms(lambda: engine.graphs.run(size), 21)
    for request in requests:
        for manager in engine.resource_managers:
            manager.free_resources(request)
    return ms


def time_forms(engine: DeviceEngine, rows: int, adapters: Sequence[RankAdapter]) -> str:
    """Of a step with adapters: as it serves, with products that wait for A x, and with kernels behind the products."""
    served = step_ms(engine, rows, adapters)
    with patch.object(thin_updates, "_READS_EARLY", not thin_updates._READS_EARLY):
        engine.graphs.capture(AdaptedRows(rows))
        other = step_ms(engine, rows, adapters)
    decodes = engine._adapted_decodes
    with patch.object(ThinLayers, "fits", lambda model, stacks=(): False):
        parts = decodes._model, decodes._operations, decodes._buffers, decodes._wide, decodes._caches
        engine._adapted_decodes = DecodeSteps(*parts, engine._adapters.stacks)
    engine.graphs.capture(AdaptedRows(rows))
    behind = step_ms(engine, rows, adapters)
    engine._adapted_decodes = decodes
    engine.graphs.capture(AdaptedRows(rows))
    return (
        f"{rows:4d} rows, {len(adapters)} adapters, reading early is {thin_updates._READS_EARLY}: {served:.3f} ms, "
        f"the other way {other:.3f}, by kernels behind the products {behind:.3f}"
    )


class TimedSite:
    """A product of all layers, with what adapters add in each form."""

    def __init__(self, engine: DeviceEngine, site: int, rows: int) -> None:
        layers, stacks = engine._model.layers, engine._adapters.stacks
        self.stacks, self.epilogue = list(stacks)[site::4], (PLAIN, RESIDUAL, GATED, RESIDUAL)[site]
        mlps = [layer.mlp for layer in layers if isinstance(layer.mlp, DeviceMlp)]
        matrices = [
            (layer.qkv, layer.output, mlp.gate_up, mlp.down)[site] for layer, mlp in zip(layers, mlps, strict=True)
        ]
        self.weights = [matrix.weight_NK for matrix in matrices]
        N, K = matrices[0].num_outputs, matrices[0].num_inputs
        outputs = N // 2 if self.epilogue == GATED else N
        self.tiling = ThinTilings(rows, has_few=True, is_adapted=True).choose(matrices[0], outputs, self.epilogue)
        self.x, self.out = (torch.randn(rows, width, device=DEVICE).bfloat16() for width in (K, outputs))
        squares = torch.ones(rows, self.tiling.num_squares(outputs), device=DEVICE)
        self.sum = ResidualSum(self.out, self.out[0].clone(), torch.empty_like(self.out), squares)
        self.given = torch.ones(rows, 64, device=DEVICE)
        self.wide = torch.randn(rows, N, device=DEVICE).bfloat16()
        self.split = SplitWorkspace.create(N, rows, 2, DEVICE)
        self.shrinking = ShrinkWorkspace.create(stacks, rows)

    def product(self, layer: int, update: LowRankUpdate | None) -> None:
        is_sum = self.epilogue == RESIDUAL
        thin_linear(
            self.x, self.weights[layer], self.sum if is_sum else self.out, is_gated=self.epilogue == GATED,
            squares_MQ=None if is_sum else self.given, epsilon=1e-5, update=update,
            tiling=self.tiling, workspace=self.split, pdl=True,
        )  # fmt: skip

    def us(self, form: str, places: Tensor) -> float:
        def run(layer: int) -> None:
            stack = self.stacks[layer]
            if form == "behind":
                self.product(layer, None)
                add_updates(self.x, places, stack, self.wide, pdl=True)
                return
            low = shrink(self.x, places, stack, self.shrinking, pdl=True)
            if form != "shrink":
                self.product(layer, LowRankUpdate(low, places, stack, reads_early=form == "early"))

        if form == "plain":
            return median_us([lambda i=i: self.product(i, None) for i in range(len(self.stacks))])
        return median_us([lambda i=i: run(i) for i in range(len(self.stacks))])


def time_sites(engine: DeviceEngine, rows: int) -> None:
    mixed = torch.arange(rows, dtype=torch.int32, device=DEVICE) % len(engine._adapters.stacks[0].ranks_L)
    forms = ("plain", "early", "waiting", "behind", "shrink")
    for number, name in enumerate(("qkv", "o", "gate_up", "down")):
        site = TimedSite(engine, number, rows)
        times = ", ".join(f"{form} {site.us(form, mixed):.1f}" for form in forms)
        none = site.us("early", torch.full_like(mixed, -1))
        print(f"{name:8s} {rows} rows, µs: {times}; early without adapters {none:.1f}", flush=True)


def profile_step(engine: DeviceEngine, size: StepSize, adapters: Sequence[RankAdapter], rows: int) -> None:
    """Kernels of a replayed step by time, then those of a layer in their order. They overlap: a kernel's share of the
    step is by how much later it ends than all before it."""
    engine.graphs.capture(size)
    ms, layers, replays = step_ms(engine, rows, adapters), len(engine._model.layers), 3
    with tempfile.TemporaryDirectory() as folder, recording(Path(folder) / "trace.json") as trace:
        for _ in range(replays):
            engine.graphs.run(size)
        torch.cuda.synchronize()
    found = of_kind(trace.events, KERNEL)
    kernels = found[len(found) * (replays - 1) // replays :]
    ends = list(accumulate((kernel.end_us for kernel in kernels), max))
    steps = [after - before for before, after in pairwise([kernels[0].start_us, *ends])]
    own = [kernel.end_us - kernel.start_us for kernel in kernels]
    print(f"{size}: {ms:.3f} ms under the profiler; {len(kernels)} kernels in {sum(steps) / 1e3:.3f} ms", flush=True)
    by_name: dict[str, list[int]] = {}
    for i, kernel in enumerate(kernels):
        by_name.setdefault(kernel.name, []).append(i)
    for name, places in sorted(by_name.items(), key=lambda item: -sum(steps[i] for i in item[1])):
        share, alone = (sum(times[i] for i in places) for times in (steps, own))
        print(f"  {share:6.0f} µs of the step, {alone:6.0f} run, {len(places):4d} x {name[:60]}", flush=True)
    names, period = [kernel.name for kernel in kernels], len(kernels) // layers
    first, last = layers // 2 * period, (layers - 2) * period
    if names[first : last - period] != names[first + period : last]:
        print("  the layers' kernels are not alike", flush=True)
        return
    for i in range(first, first + period):
        share, alone = (median(times[i:last:period]) for times in (steps, own))
        print(f"  layer: {share:5.1f} µs of the step, {alone:5.1f} run  {names[i][:60]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--forms", action="store_true", help="other forms of steps and products, and kernels of a step")
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
        if options.forms:
            rows = 64 if 64 in options.rows else options.rows[0]
            print(time_forms(engine, rows, adapters), flush=True)
            time_sites(engine, rows)
            prepare()
            profile_step(engine, AdaptedRows(rows), adapters, rows)
            profile_step(engine, rows, (), rows)


if __name__ == "__main__":
    main()
