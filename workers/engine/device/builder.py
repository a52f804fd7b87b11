"""`DeviceEngineBuilder`: device engines over one model: one to measure what steps take, then the one that serves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tensorweave.cluster.protocol import ModelInfo
from tensorweave.kernels.device_operations import DeviceOperations
from tensorweave.workers.engine.device.adapter_places import PlacesAdapters
from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.engine.device.graphs import GraphSizes
from tensorweave.workers.engine.device.rank_exchange import RankExchange
from tensorweave.workers.engine.device.warm_up import run_step, warm_up_mixed_steps
from tensorweave.workers.engine.device_memory import (
    GRAPH_KNOBS,
    CudaMemory,
    measure_graph_memory,
    measure_step_memory,
    naming_knobs,
)
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.lora.rank_adapter import AdapterReader
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.model import DeviceModel
from tensorweave.workers.start_log import StartLog


@dataclass(frozen=True, slots=True)
class DeviceEngineBuilder:
    model: DeviceModel
    operations: DeviceOperations
    buffers: StepBuffers
    graphs: GraphSizes
    ranks: RankExchange
    adapters: Callable[[], PlacesAdapters]
    adapter_reader: AdapterReader | None = None

    def make(self, pool: KVPool, info: ModelInfo) -> DeviceEngine:
        parts = (self.model, self.operations, pool, info, self.buffers, self.graphs, self.ranks)
        return DeviceEngine(*parts, self.adapters(), self.adapter_reader)

    def compile(self, engine: DeviceEngine, log: StartLog) -> None:
        """Compile the Triton kernels of all steps in parallel, without running a step. On a CPU there are none."""
        if self.model.device.type != "cuda":
            return
        from tensorweave.kernels.compile_ahead import compile_ahead  # Triton is installed where there is a GPU

        with log.part("compiling kernels") as tell:
            self.ranks.meet()
            compile_ahead(lambda: self._call_every_step(engine), on_progress=tell)

    def measure(self, trial: DeviceEngine) -> int:
        """Bytes that must stay free beside the KV cache: for the largest step, and for all graphs. `trial` is an engine
        with a small KV cache, of no use afterwards."""
        memory, max_tokens = CudaMemory(self.model.device), self.buffers.max_tokens
        self.ranks.meet()
        run_step(trial, max_tokens, 0)  # what is left allocated for good is so now
        step_bytes = measure_step_memory(lambda: run_step(trial, max_tokens, 0), memory)
        graph_bytes = measure_graph_memory(
            lambda num_rows: trial.graphs.capture(trial.largest_decode(num_rows)), self.graphs.sizes, memory
        )
        share = len(trial.captured_sizes) / max(1, len(self.graphs.sizes))  # none has many more kernels
        return step_bytes + math.ceil(graph_bytes * share)

    def warm_up(self, engine: DeviceEngine, log: StartLog) -> None:
        """Run steps of each kind and capture graphs, so that no request waits for that. Raises WorkerLost if a kernel
        has waited in vain for another rank by then."""
        self.ranks.meet()
        with log.part("warming up") as tell:
            warm_up_mixed_steps(engine, self.buffers.max_rows, self.buffers.max_tokens)
            if self.model.device.type == "cuda":
                with naming_knobs("CUDA graphs", GRAPH_KNOBS):
                    engine.graphs.capture_all(engine.captured_sizes, lambda done, total: tell(done / max(total, 1)))
                torch.cuda.synchronize(self.model.device)
        if self.ranks.check is not None:
            self.ranks.check()

    def _call_every_step(self, engine: DeviceEngine) -> None:
        with torch.no_grad():
            warm_up_mixed_steps(engine, self.buffers.max_rows, self.buffers.max_tokens)
            for size in engine.captured_sizes:
                engine.graphs.run(size)
