"""`build_executor`: what its arguments turn into; with KV transfer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensorweave.cluster.cache_transceiver_config import CacheTransceiverConfig
from tensorweave.cluster.protocol import KvSource
from tensorweave.cluster.quant_config import QuantConfig
from tensorweave.cluster.scheduler_config import SchedulerConfig
from tensorweave.cluster.step_settings import StepSettings
from tensorweave.kernels.attention.backend import AttentionBackend
from tensorweave.kernels.attention.native import NativeAttention
from tensorweave.kernels.attention.torch_backend import TorchAttention
from tensorweave.workers.autodeploy.engine import AutodeployEngine
from tensorweave.workers.build import _prompt_share, build_executor
from tensorweave.workers.engine.engine import PyTorchModelEngine
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.prompt_share import BalancedShare, FixedShare
from tensorweave.workers.gang.comm import Comm, SoloComm
from tensorweave.workers.kv.manager import KVCacheManager
from tests.kernels.forms import needs_native
from tests.workers.engine_drive import engine_args, generate, run_ranks
from tests.workers.tiny_models import make_model, their_greedy
from tests.workers.waiting import WAIT_S


def test_an_executor_is_built_with_transfer(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    args = engine_args(tmp_path, cache_transceiver_config=CacheTransceiverConfig(backend="DEFAULT"))

    def build(comm: Comm) -> PyExecutor:
        return build_executor(args, comm, transfer_host="127.0.0.1", transfer_secret="s")

    ranks = run_ranks(3, build)
    heads = [(end.first_head, end.num_heads) for rank in ranks if (end := rank.kv_endpoint) is not None]
    assert heads == [(0, 1), (0, 2), (1, 1)]
    alone = build(SoloComm())
    assert alone.kv_fingerprint == ranks[0].kv_fingerprint == ranks[2].kv_fingerprint
    assert alone.kv_fingerprint["layout"] == "3 layers, 2 KV heads of 8"
    source = KvSource("g", tuple(rank.kv_endpoint for rank in ranks if rank.kv_endpoint), ranks[0].kv_fingerprint, "s")
    link = alone.measure_link(source, WAIT_S)
    assert link.error is None
    assert link.bytes_per_s > 1e5
    assert 0 < link.latency_s < WAIT_S
    closed = alone.measure_link(KvSource("g", source.endpoints, source.fingerprint, "guessed"), WAIT_S)
    assert "wrong secret" in str(closed.error)
    misfit = alone.measure_link(KvSource("g", source.endpoints, {**source.fingerprint, "dtype": "bfloat16"}, "s"))
    assert str(misfit.error).startswith("dtype: ")
    for rank in (*ranks, alone):
        rank._transfers.shutdown()


def test_random_weights_are_those_of_a_kind_of_device(tmp_path: Path) -> None:
    """A CPU and a GPU draw different ones, so that gangs on both must not exchange KV."""
    make_model("llama", tmp_path)
    config = CacheTransceiverConfig(backend="DEFAULT")
    told = []
    for load_format in ("dummy", "auto"):
        args = engine_args(tmp_path, cache_transceiver_config=config, load_format=load_format)
        executor = build_executor(args, SoloComm(), transfer_host="127.0.0.1", transfer_secret="s")
        told.append(executor.kv_fingerprint["model"])
        executor._transfers.shutdown()
    assert told[0].endswith(" on cpu")
    assert not told[1].endswith(" on cpu")


def test_keys_rotated_by_long_factors_are_of_another_kind(tmp_path: Path) -> None:
    make_model("phi4_mini", tmp_path)
    config = CacheTransceiverConfig(backend="DEFAULT")
    told = {}
    for max_seq_len in (None, 1024, 1025):
        args = engine_args(tmp_path, cache_transceiver_config=config, max_seq_len=max_seq_len)
        executor = build_executor(args, SoloComm(), transfer_host="127.0.0.1", transfer_secret="s")
        told[executor.info.max_seq_len] = executor.kv_fingerprint["model"].endswith(" with long factors")
        executor._transfers.shutdown()
    assert told == {1024: False, 1025: True}


@needs_native
@pytest.mark.parametrize("backend", ["pytorch", "_autodeploy"])
@pytest.mark.parametrize(("attn_backend", "form"), [("TRTLLM", NativeAttention), ("VANILLA", TorchAttention)])
def test_the_attention_that_is_asked_for_is_used(
    tmp_path: Path, backend: str, attn_backend: str, form: type[AttentionBackend]
) -> None:
    model = make_model("llama", tmp_path, head_dim=32)
    engine = build_executor(engine_args(tmp_path, backend=backend, attn_backend=attn_backend), SoloComm())._engine
    assert isinstance(engine, PyTorchModelEngine | AutodeployEngine)
    assert isinstance(engine._attention, form)
    assert generate(engine, [[7, 8, 9]], 3) == their_greedy(model, [[7, 8, 9]], 3)


@pytest.mark.parametrize(("disabled", "depth"), [(None, 0), (True, 0), (False, 1)])
def test_on_a_cpu_steps_overlap_only_if_that_is_asked_for(tmp_path: Path, disabled: bool | None, depth: int) -> None:
    make_model("llama", tmp_path)
    executor = build_executor(engine_args(tmp_path, disable_overlap_scheduler=disabled), SoloComm())
    assert executor._loop._depth == depth


@pytest.mark.parametrize(
    ("options", "is_balanced"),
    [
        ({}, True),
        ({"quant_config": QuantConfig(quant_algo="FP8")}, False),
        ({"kv_cache_config": {"dtype": "fp8"}}, False),
        ({"scheduler_config": SchedulerConfig(max_prompt_tokens_beside_decodes=64)}, False),
        ({"backend": "_autodeploy"}, False),
    ],
)
def test_prompts_of_16_bit_models_are_balanced_on_a_gpu(
    tmp_path: Path, options: dict[str, Any], is_balanced: bool
) -> None:
    make_model("llama", tmp_path)
    args = engine_args(tmp_path, **options)
    share = _prompt_share(args, StepSettings.of(args, "cuda"), KVCacheManager(8, 32))
    assert isinstance(share, BalancedShare) == is_balanced
    assert isinstance(share, FixedShare) != is_balanced


def test_transfer_without_a_secret_is_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    args = engine_args(tmp_path, cache_transceiver_config=CacheTransceiverConfig(backend="TCP"))
    with pytest.raises(ValueError, match="no secret"):
        build_executor(args, SoloComm())
    without = build_executor(engine_args(tmp_path), SoloComm(), transfer_secret="s")
    assert without.kv_endpoint is None
    assert without.kv_fingerprint == {}
