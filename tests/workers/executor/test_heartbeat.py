"""A step that takes long is not one that hangs: every layer is progress, whoever computes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.kernels.native.library import load_native
from tensorweave.workers.build import build_executor
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.fakes.fake_engine import HashEngine, HashStep
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.models.stack import NativeStack
from tensorweave.workers.sampling.decoder import SamplingDecoder
from tensorweave.workers.step.pending import StepLogits
from tensorweave.workers.step.resources import ResourceManager
from tests.workers.tiny_models import make_model

PATIENCE_S = 60.0


class _Held(HashEngine):
    """A step that lasts until it is let go, and counts layers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.is_computing = threading.Event()
        self.may_end = threading.Event()

    def compute(self, step: HashStep) -> StepLogits:
        self.is_computing.set()
        assert self.may_end.wait(PATIENCE_S)
        return super().compute(step)


def executor_of(engine: _Held) -> PyExecutor:
    kv_cache = KVCacheManager(num_blocks=engine.info.num_blocks, tokens_per_block=engine.info.tokens_per_block)
    decoder = SamplingDecoder()
    return PyExecutor(
        engine=engine,
        scheduler=SimpleScheduler(kv_cache),
        resources=ResourceManager([decoder.states, kv_cache]),
        decoder=decoder,
        comm=SoloComm(),
        info=engine.info,
    )


def test_a_long_step_makes_progress_and_a_hung_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _Held()
    executor = executor_of(engine)
    executor.start()
    try:
        executor.enqueue_request(GenerateRequest("r", [1, 2, 3], SamplingSpec(2)))
        assert engine.is_computing.wait(PATIENCE_S)
        now_s = time.monotonic()
        monkeypatch.setattr("tensorweave.workers.executor.executor.time", SimpleNamespace(monotonic=lambda: now_s))
        for _ in range(5):
            now_s += 1000.0
            engine.progress += 1
            assert executor.heartbeat() == 0.0
        now_s += 1000.0
        assert executor.heartbeat() == pytest.approx(1000.0)
        now_s += 1000.0
        assert executor.heartbeat() == pytest.approx(2000.0)
        monkeypatch.undo()
    finally:
        engine.may_end.set()
        executor.shutdown(PATIENCE_S)


def tokens_of(executor: PyExecutor, request: GenerateRequest) -> Sequence[int]:
    executor.enqueue_request(request)
    tokens: list[int] = []
    while True:
        for chunk in executor.await_responses(timeout_s=PATIENCE_S):
            tokens += chunk.token_ids
            if chunk.is_last:
                return tokens


@pytest.mark.parametrize("backend", ["pytorch", "_autodeploy"])
@pytest.mark.parametrize("is_native", [True, False])
def test_every_layer_counts(backend: str, is_native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_native:
        monkeypatch.setattr("tensorweave.workers.models.stack.native_layers", lambda *parts: None)
    make_model("llama", tmp_path)
    args = TorchLlmArgs(
        model=tmp_path, backend=backend, device="cpu", dtype="float32", kv_cache_config={"max_tokens": 512}
    )
    executor = build_executor(args, SoloComm())
    num_layers = len(executor._engine.pool.layers)
    executor.start()
    try:
        assert len(tokens_of(executor, GenerateRequest("r", [5, 6, 7], SamplingSpec(4)))) == 4
        assert executor._engine.progress == 4 * num_layers
        assert executor.heartbeat() < PATIENCE_S
        assert executor._seen_progress == 4 * num_layers
    finally:
        executor.shutdown(PATIENCE_S)


@pytest.mark.skipif(load_native(torch.float32) is None, reason="no compiler")
def test_the_native_layers_are_those_that_count(tmp_path: Path) -> None:
    make_model("llama", tmp_path, head_dim=64)
    args = TorchLlmArgs(model=tmp_path, device="cpu", dtype="float32", kv_cache_config={"max_tokens": 512})
    executor = build_executor(args, SoloComm())
    model = executor._engine._model
    executor.start()
    try:
        tokens_of(executor, GenerateRequest("r", [5, 6, 7], SamplingSpec(2)))
        assert isinstance(model.stack, NativeStack)
        assert model.num_layers_done == 2 * len(executor._engine.pool.layers)
    finally:
        executor.shutdown(PATIENCE_S)
