"""Constructor arguments: ours are honoured, and all others that TensorRT-LLM has are refused by name."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from tensorweave import LLM, MoeConfig, QuantAlgo, QuantConfig, SamplingParams, TorchLlmArgs
from tensorweave.cluster.cache_transceiver_config import CacheTransceiverConfig
from tensorweave.cluster.kv_cache_config import KvCacheConfig
from tensorweave.cluster.llm_args import gang_mesh, kv_cache_dtype
from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.quant_config import weight_quantization
from tensorweave.cluster.scheduler_config import SchedulerConfig
from tensorweave.cluster.strict_model import StrictBaseModel
from tests.llmapi.small_llm import CACHE, one

CONFIGS = {
    "kv_cache_config": KvCacheConfig,
    "scheduler_config": SchedulerConfig,
    "cache_transceiver_config": CacheTransceiverConfig,
    "quant_config": QuantConfig,
    "moe_config": MoeConfig,
}


@pytest.mark.parametrize("config", [TorchLlmArgs, *CONFIGS.values()], ids=lambda config: config.__name__)
def test_what_is_not_supported_is_refused_by_name(config: type[StrictBaseModel]) -> None:
    required = {"model": "m"} if config is TorchLlmArgs else {}
    assert config.refused
    assert not config.refused.keys() & config.model_fields.keys()
    for name, refusal in config.refused.items():
        with pytest.raises(ValueError, match=f"{name} = 'something' is not supported yet: "):
            config(**required, **{name: "something"})
        for value in refusal.neutral:
            assert config(**required, **{name: value}) == config(**required)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size"),
        ({"pipeline_parallel_size": 2, "device": "cuda"}, "pipeline stages do not support device 'cuda' yet"),
        (
            {"pipeline_parallel_size": 2, "scheduler": "a:B", "cache_transceiver_config": {"backend": "DEFAULT"}},
            r"pipeline stages do not support cache_transceiver_config \(pools of role '.*'\), scheduler yet",
        ),
        (
            {"pipeline_parallel_size": 2, "speculative_config": {"decoding_type": "NGram", "max_draft_len": 2}},
            "pipeline stages do not support speculative_config yet",
        ),
        ({"pipeline_parallel_size": 2, "backend": "_autodeploy"}, "pipeline stages do not support backend '_autodep"),
        ({"lora_config": {"lora_dir": ["a"]}}, "lora_dir = .* is not supported yet"),
        ({"lora_config": {"max_loras": 4, "max_cpu_loras": 3}}, "max_cpu_loras is 3, must be at least max_loras"),
        ({"enable_lora": True, "backend": "_autodeploy"}, "'_autodeploy' takes no LoRA adapters"),
        ({"kv_cache_config": {"host_cache_size": 1 << 30}}, "host_cache_size"),
        ({"kv_cache_config": {"event_buffer_max_size": -1}}, "event_buffer_max_size"),
        ({"batched_logits_processor": "mask"}, "batched_logits_processor is a str"),
        ({"garbage_collection_gen0_threshold": 0}, "garbage_collection_gen0_threshold"),
        ({"enable_tqdm": True, "tensor_parallel_size": 2}, "enable_tqdm shows bars for one rank"),
        ({"allreduce_strategy": "TWOSHOT"}, "allreduce_strategy 'TWOSHOT' is not part of tensorweave; use 'AUTO'"),
        ({"cache_transceiver_config": {"backend": "IPC", "max_copy_sms": 8}}, "max_copy_sms is for backend 'IPC_DIR"),
        ({"attn_backend": "FLASHINFER"}, "attn_backend 'FLASHINFER' is not part of tensorweave; use 'TRTLLM'"),
        ({"cuda_graph_config": {"batch_sizes": [4, 0]}}, "batch_sizes has 0, must be at least 1"),
        ({"cuda_graph_config": {"batch_sizes": [1, 4], "max_batch_size": 8}}, "the largest of batch_sizes 4: give one"),
        (
            {"moe_expert_parallel_size": 2},
            r"moe_tensor_parallel_size is None and moe_expert_parallel_size 2; their product must be "
            r"tensor_parallel_size \(1\)",
        ),
        ({"moe_config": {"backend": "CUTLASS"}}, "backend 'CUTLASS' is not part of tensorweave; use 'AUTO'"),
        ({"moe_config": {"backend": "FAST"}}, "Input should be 'AUTO', 'VANILLA'"),
        ({"moe_cluster_parallel_size": 2}, "use moe_tensor_parallel_size and moe_expert_parallel_size"),
        ({"iter_stats_max_iteration": 5}, "did you mean 'iter_stats_max_iterations'"),
    ],
)
def test_through_the_constructor(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LLM(tmp_path, **arguments)


def test_bars_are_shown_if_that_is_asked_for(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(directory, dtype="float32", kv_cache_config=CACHE, enable_tqdm=True):
        assert "loading the weights: " in capsys.readouterr().err
    with LLM(directory, dtype="float32", kv_cache_config=CACHE):
        assert "loading the weights" not in capsys.readouterr().err


def test_knobs_are_honoured(directory: Path) -> None:
    before = gc.get_threshold()
    try:
        with LLM(
            directory,
            dtype="float32",
            kv_cache_config=CACHE,
            enable_iter_perf_stats=False,
            return_perf_metrics=True,
            garbage_collection_gen0_threshold=1234,
            pipeline_parallel_size=1,
            enable_lora=False,
        ) as llm:
            output = one(llm.generate([5, 6], SamplingParams(max_tokens=3)))
            assert output.outputs[0].request_perf_metrics is not None
            assert llm.get_stats() == []
            assert llm.get_kv_cache_events() == []
            assert gc.get_threshold()[0] == 1234
            with pytest.raises(ValueError, match="needs an LLM that was given a batched_logits_processor"):
                llm.generate([5], SamplingParams(apply_batched_logits_processor=True))
    finally:
        gc.set_threshold(*before)


def test_engine_directories_and_workspace(directory: Path) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with LLM(directory, dtype="float32", kv_cache_config=CACHE) as llm:
        expected = one(llm.generate("France", params)).outputs[0]
        workspace = llm.workspace
        assert workspace is not None
        assert workspace == llm.workspace
        llm.save(str(workspace / "engine"))
        with pytest.raises(ValueError, match="already"):
            llm.save(workspace / "engine")
        with LLM(workspace / "engine", kv_cache_config=CACHE) as saved:
            output = one(saved.generate("France", params)).outputs[0]
            assert (output.token_ids, output.text) == (expected.token_ids, expected.text)
            assert saved.workspace != workspace
        assert workspace.is_dir()
    assert not workspace.exists()
    assert llm.workspace is None
    with pytest.raises(RuntimeError, match="shut down"):
        llm.save("elsewhere")


@pytest.mark.parametrize(
    ("ranks", "tensor", "expert", "groups"),
    [(1, None, None, 1), (4, None, None, 1), (4, 4, None, 1), (4, 1, None, 4), (4, None, 2, 2), (6, 2, 3, 3)],
)
def test_ranks_share_experts(ranks: int, tensor: int | None, expert: int | None, groups: int) -> None:
    args = TorchLlmArgs(
        model="m", tensor_parallel_size=ranks, moe_tensor_parallel_size=tensor, moe_expert_parallel_size=expert
    )
    assert gang_mesh(args) == Mesh(tensor=ranks, expert=groups)
    staged = args.model_copy(update={"pipeline_parallel_size": 3})
    assert gang_mesh(staged) == Mesh(tensor=ranks, pipeline=3, expert=groups)


@pytest.mark.parametrize(("tensor", "expert"), [(3, None), (8, None), (None, 3), (None, 8), (2, 1), (4, 2)])
def test_groups_of_ranks_must_be_all_ranks(tensor: int | None, expert: int | None) -> None:
    with pytest.raises(ValueError, match=r"their product must be tensor_parallel_size \(4\)"):
        TorchLlmArgs(
            model="m", tensor_parallel_size=4, moe_tensor_parallel_size=tensor, moe_expert_parallel_size=expert
        )


def test_quantization() -> None:
    by_enum = TorchLlmArgs(model="m", quant_config=QuantConfig(quant_algo=QuantAlgo.FP8, kv_cache_quant_algo="FP8"))
    assert (weight_quantization(by_enum.quant_config), kv_cache_dtype(by_enum)) == ("fp8", "fp8")
    by_name = TorchLlmArgs(model="m", quant_config={"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "group_size": 128})
    assert (weight_quantization(by_name.quant_config), kv_cache_dtype(by_name)) == ("fp8", "auto")
    integers = TorchLlmArgs(model="m", quant_config={"quant_algo": "W4A16"})
    assert weight_quantization(integers.quant_config) == "w4a16_g32"
    fine = TorchLlmArgs(model="m", quant_config=QuantConfig(quant_algo=QuantAlgo.INT8, group_size=64))
    assert weight_quantization(fine.quant_config) == "w8a8_g64"
    with_minimums = QuantConfig(quant_algo="W4A16", has_zero_point=True)
    assert weight_quantization(with_minimums) == "w4a16_g32_min"
    plain = TorchLlmArgs(model="m", quant_config={}, kv_cache_config={"dtype": "fp8"})
    assert (weight_quantization(plain.quant_config), kv_cache_dtype(plain)) == (None, "fp8")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"quant_config": {"quant_algo": "NVFP4"}}, "Input should be 'FP8', 'FP8_PER_CHANNEL_PER_TOKEN', 'W8A16'"),
        ({"quant_config": {"quant_algo": "W8A16", "has_zero_point": True}}, "has_zero_point is for integers of 4 bits"),
        ({"quant_config": {"quant_algo": "FP8", "group_size": 64}}, "group_size is 64; it is for integers: W8A16"),
        (
            {"quant_config": {"quant_algo": "FP8", "exclude_modules": ["o_proj"]}},
            "all matrices of the layers are quantized",
        ),
        ({"quant_config": {"quant_algo": "FP8"}, "backend": "_autodeploy"}, "'_autodeploy' runs checkpoints as they"),
        ({"kv_cache_config": {"dtype": "fp8"}, "backend": "_autodeploy"}, "'_autodeploy' runs checkpoints as they"),
    ],
)
def test_quantization_that_is_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchLlmArgs(model="m", **knobs)
