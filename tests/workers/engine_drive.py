"""Runs engines without an executor: a KV cache that hands out scattered blocks, mixed batches, ranks as threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.engine.engine import ModelEngine
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.gang.comm import Comm, SoloComm
from tensorweave.workers.gang.stages import OneStage, StageLink
from tensorweave.workers.step.adapter import RankAdapter
from tensorweave.workers.step.pending import NothingPending
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import BlockCopy

VOCAB = 211
PEER_TIMEOUT_S = 120.0
T = TypeVar("T")


class ScatteredBlocks:
    """Enough of a KV manager for an engine: blocks in a random order, never freed."""

    def __init__(self, num_blocks: int, tokens_per_block: int, seed: int = 0) -> None:
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)
        self._tokens_per_block = tokens_per_block
        self._tables: dict[str, list[int]] = {}
        self.copies: list[BlockCopy] = []

    @property
    def kv_cache(self) -> ScatteredBlocks:
        """The engine asks a `ResourceManager` for this; here they are one."""
        return self

    def block_ids(self, request: LlmRequest) -> list[int]:
        table = self._tables.setdefault(request.request_id, [])
        while len(table) * self._tokens_per_block < len(request.tokens):
            table.append(self._free.pop())
        return table

    def take_block(self) -> int:
        return self._free.pop()

    def exchange(self, request: LlmRequest, at: int, block: int) -> None:
        table = list(self._tables[request.request_id])
        table[at] = block
        self._tables[request.request_id] = table

    def take_copies(self) -> list[BlockCopy]:
        copies, self.copies = self.copies, []
        return copies


def make_request(order: int, prompt: Sequence[int], max_tokens: int = 64) -> LlmRequest:
    return LlmRequest(f"r{order}", order, list(prompt), len(prompt), SamplingSpec(max_tokens=max_tokens))


def random_prompts(count: int, longest: int, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def logits_of(engine: ModelEngine, batch: ScheduledBatch, resources: Any) -> Tensor:
    """Of the sampled rows of one step, when every step before has settled."""
    logits_RV = engine.launch(batch, resources, NothingPending()).result().sampled_RV
    if isinstance(engine, DeviceEngine):
        logits_RV = engine.vocabulary.whole(logits_RV)
    return logits_RV[: len(batch.sampled)]


def generate(
    engine: ModelEngine,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    chunk: int = 64,
    most_running: int = 16,
    adapters: Sequence[RankAdapter | None] = (),
) -> list[list[int]]:
    """Greedy tokens of every prompt, with its adapter. Each step has a chunk of up to two prompts, and all decodes:
    batches are mixed."""
    info = engine.info
    resources: Any = ScatteredBlocks(info.num_blocks, info.tokens_per_block)
    requests = [make_request(i, prompt) for i, prompt in enumerate(prompts)]
    for request, adapter in zip(requests, adapters, strict=False):
        request.adapter = adapter
    waiting, running = list(requests), []
    while waiting or running:
        decodes = tuple(StepRow.of_decode(request) for request in running)
        chunks = [
            StepRow.of_context(request, request.num_computed, min(chunk, request.context_len - request.num_computed))
            for request in waiting[: min(2, most_running - len(running))]
        ]
        batch = ScheduledBatch(tuple(chunks), decodes)
        token_ids = logits_of(engine, batch, resources).argmax(-1).tolist()
        for part in chunks:
            part.request.num_computed += part.length
            part.request.num_launched = part.stop
            if part.num_samples:
                waiting.remove(part.request)
                running.append(part.request)
        for row, token in zip(batch.sampled, token_ids, strict=True):
            row.request.num_launched = row.stop
            row.request.tokens.append(token)
            if row.request.num_output >= num_tokens:
                row.request.state = RequestState.DONE
        running = [request for request in running if request.num_output < num_tokens]
    return [request.tokens[request.prompt_len :] for request in requests]


class ThreadComm:
    """A rank whose peers are threads of this process."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.place = MeshRank(rank, Mesh(tensor=len(shared)))
        self.rank, self.size = rank, len(shared)
        self.stages: StageLink = OneStage()
        self._shared, self._barrier = shared, barrier

    def divide_experts(self, groups: int) -> None:
        self.place = MeshRank(self.rank, Mesh(tensor=self.size, expert=groups))

    def _exchange(self, mine: Any) -> list[Any]:
        self._shared[self.rank] = mine
        self._barrier.wait(PEER_TIMEOUT_S)
        everyone = list(self._shared)
        self._barrier.wait(PEER_TIMEOUT_S)
        return everyone

    def agree(self, data: bytes | None) -> bytes:
        agreed: bytes = self._exchange(data)[0]
        return agreed

    def agree_min(self, value: int) -> int:
        return int(min(self._exchange(value)))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        parts = self._exchange(tensor.clone())
        return tensor.copy_(torch.stack(parts).sum(0))

    def gather_columns(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        parts = self._exchange(tensor.clone())
        assert [part.shape[1] for part in parts] == list(sizes)
        return torch.cat(parts, dim=1)

    def close(self) -> None:
        return None


def run_ranks(size: int, work: Callable[[Comm], T], expert: int = 1) -> list[T]:
    """What `work` gives on each rank of a gang of threads, of `expert` groups that have different experts."""
    shared: list[Any] = [None] * size
    barrier = threading.Barrier(size)

    def one_rank(rank: int) -> T:
        torch.set_num_threads(1)
        try:
            comm = ThreadComm(rank, shared, barrier)
            comm.divide_experts(expert)
            return work(comm)
        except BaseException:
            barrier.abort()
            raise

    if size == 1:
        return [work(SoloComm())]
    with ThreadPoolExecutor(size) as pool:
        return [
            future.result(timeout=PEER_TIMEOUT_S * 2)
            for future in [pool.submit(one_rank, rank) for rank in range(size)]
        ]


def engine_args(path: Path, **knobs: Any) -> TorchLlmArgs:
    kv = {"max_tokens": 8192, "tokens_per_block": 16, **knobs.pop("kv_cache_config", {})}
    return TorchLlmArgs(
        model=path,
        dtype=knobs.pop("dtype", "float32"),
        device=knobs.pop("device", "cpu"),
        num_threads=1,
        kv_cache_config=kv,
        **knobs,
    )


def generate_on_ranks(
    path: Path,
    size: int,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    chunk: int = 64,
    expert: int = 1,
    **knobs: Any,
) -> list[list[int]]:
    """Greedy tokens through `size` ranks, of `expert` groups that have different experts. All must agree."""

    def work(comm: Comm) -> list[list[int]]:
        return generate(load_engine(engine_args(path, **knobs), comm), prompts, num_tokens, chunk=chunk)

    first, *others = run_ranks(size, work, expert)
    assert all(other == first for other in others)
    return first
