"""8-bit weights and an 8-bit KV cache on the CPU engines, against transformers' model with the same rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.kernels.weights import FP8, QuantizedWeight, quantize_rows, quantize_weight
from tensorweave.workers.engine.engine import ModelEngine
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.engine_dir.directory import save_engine_dir
from tensorweave.workers.engine_dir.manifest import EngineManifest, rank_file
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.gang.device import check_fp8
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tests.workers.engine_drive import (
    ScatteredBlocks,
    engine_args,
    generate,
    generate_on_ranks,
    logits_of,
    make_request,
    random_prompts,
)
from tests.workers.tiny_models import make_model
from tests.workers.transfer_drive import model_gang, run_aggregated, run_disaggregated

PROMPTS = [*random_prompts(4, 60), [7]]
FP8_WEIGHTS: dict[str, Any] = {"quant_config": {"quant_algo": "FP8"}}
FP8_KV: dict[str, Any] = {"kv_cache_config": {"dtype": "fp8"}}


def round_products(model: PreTrainedModel) -> PreTrainedModel:
    """Every product but the head's: weights to 8 bits per output, inputs per token."""

    def rounded(x: Tensor) -> Tensor:
        values, scales = quantize_rows(x)
        return values.float() * scales.unsqueeze(-1)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    return model


def last_logits(engine: ModelEngine) -> Tensor:
    """Of each prompt, whose chunks end at different tokens than transformers' do."""
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    rows = []
    for i, prompt in enumerate(PROMPTS):
        request = make_request(i, prompt)
        for start in range(0, len(prompt), 23):
            batch = ScheduledBatch((StepRow.of_context(request, start, min(23, len(prompt) - start)),))
            logits = logits_of(engine, batch, resources)
        rows.append(logits[0].clone())
    return torch.stack(rows)


def step_logits(engine: ModelEngine, num_decodes: int = 3) -> list[Tensor]:
    """Of one step with all prompts, then of steps with a given token for each."""
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    requests = [make_request(i, prompt) for i, prompt in enumerate(PROMPTS)]
    batch = ScheduledBatch(tuple(StepRow.of_context(request, 0, len(request.tokens)) for request in requests))
    steps = [logits_of(engine, batch, resources)[: len(requests)].float().clone()]
    for step in range(num_decodes):
        for i, request in enumerate(requests):
            request.num_computed = request.num_launched = len(request.tokens)
            request.tokens.append((7 * i + 31 * step + 3) % engine.info.vocab_size)
        batch = ScheduledBatch((), tuple(StepRow.of_decode(request) for request in requests))
        steps.append(logits_of(engine, batch, resources)[: len(requests)].float().clone())
    return steps


def their_logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


def load(path: Path, *, is_on_device: bool = False, **knobs: Any) -> ModelEngine:
    return load_engine(engine_args(path, **knobs), SoloComm(), is_on_device=is_on_device)


@pytest.mark.parametrize("is_on_device", [False, True])
@pytest.mark.parametrize("name", ["llama_tied_9_over_3", "llama_8_over_2", "qwen2", "qwen3"])
def test_8_bit_weights(name: str, is_on_device: bool, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    exact = their_logits(model)
    expected = their_logits(round_products(model))
    ours = last_logits(load(tmp_path, is_on_device=is_on_device, **FP8_WEIGHTS))
    assert relative_error(expected, exact) > 0.01, "the model is one that rounding changes"
    assert relative_error(ours, expected) < 0.02, "but for numbers that other sums have moved to a neighbour"
    assert relative_error(ours, exact) < 0.3


@pytest.mark.parametrize("is_on_device", [False, True])
def test_an_8_bit_cache(is_on_device: bool, tmp_path: Path) -> None:
    exact = their_logits(make_model("llama_8_over_2", tmp_path))
    engine = load(tmp_path, is_on_device=is_on_device, **FP8_KV)
    assert engine.pool.cache.dtype == FP8
    assert engine.info.kv_bytes_per_token == 3 * 2 * 2 * 6
    assert 0.001 < relative_error(last_logits(engine), exact) < 0.2


def test_both_engines_agree(tmp_path: Path) -> None:
    make_model("llama_8_over_2", tmp_path)
    knobs = {**FP8_KV, "quant_config": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "kv_cache_quant_algo": "FP8"}}
    engines = [load(tmp_path, is_on_device=is_on_device, **knobs) for is_on_device in (False, True)]
    one, other = (last_logits(engine) for engine in engines)
    assert relative_error(one, other) < 0.02
    assert all(len(tokens) == 6 for tokens in generate(engines[1], PROMPTS, 6))


@pytest.mark.parametrize("size", [1, 2])
def test_an_engine_directory_keeps_8_bit_weights(size: int, tmp_path: Path) -> None:
    make_model("llama_8_over_2", tmp_path / "model")
    expected = generate_on_ranks(tmp_path / "model", size, PROMPTS, 6, **FP8_WEIGHTS)
    out = tmp_path / "engine"
    save_engine_dir(tmp_path / "model", out, tensor_parallel_size=size, dtype="float32", quantization="fp8")
    manifest = EngineManifest.read(out)
    assert manifest is not None
    assert manifest.quantization == "fp8"
    with safe_open(str(rank_file(out, 0)), framework="pt") as file:
        stored = [file.get_tensor(name).dtype for name in file.keys()]  # noqa: SIM118
    assert stored.count(FP8) == 3 * 4, "four matrices of three layers"
    assert generate_on_ranks(out, size, PROMPTS, 6) == expected, "its own quantization needs no quant_config"
    assert generate_on_ranks(out, size, PROMPTS, 6, **FP8_WEIGHTS) == expected
    save_engine_dir(out, tmp_path / "copy", tensor_parallel_size=size, dtype="auto", quantization="fp8")
    assert EngineManifest.read(tmp_path / "copy") == manifest


def test_an_engine_directory_without_quantization_is_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    save_engine_dir(tmp_path / "model", tmp_path / "engine", tensor_parallel_size=1, dtype="float32")
    with pytest.raises(ValueError, match="was saved without the quantization that quant_config asks for"):
        load(tmp_path / "engine", **FP8_WEIGHTS)


def test_a_manifest_of_another_quantization_is_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    out = tmp_path / "engine"
    save_engine_dir(tmp_path / "model", out, tensor_parallel_size=1, dtype="float32", quantization="fp8")
    manifest = EngineManifest.read(out)
    assert manifest is not None
    replace(manifest, quantization="int3").write(out)
    with pytest.raises(ValueError, match="has quantization 'int3', which this version does not read"):
        load(out)


def test_8_bit_blocks_go_from_gang_to_gang(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    samplings = [SamplingSpec(max_tokens=6)] * len(PROMPTS)
    with model_gang(tmp_path, name="one", **FP8_KV) as gang:
        expected = [answer.tokens for answer in run_aggregated(gang, PROMPTS, samplings)]
    with model_gang(tmp_path, 1, name="P", **FP8_KV) as prefill, model_gang(tmp_path, 2, name="D", **FP8_KV) as decode:
        answers = [answer.tokens for answer in run_disaggregated(prefill, decode, PROMPTS, samplings)]
        assert decode.failures() == {}
        assert decode.gauge("kv_transfer_blocks_total") > 0
    assert answers == expected


def test_a_gpu_without_8_bit_floats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_fp8(torch.device("cpu"))
    for capability in ((9, 0), (8, 9)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        check_fp8(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ValueError, match=r"need a GPU of compute capability 8\.9 or more; this one has 8\.0"):
        check_fp8(torch.device("cuda", 0))


def test_a_large_matrix_is_quantized_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 20)
    whole = quantize_weight(weight)
    monkeypatch.setattr("tensorweave.kernels.weights._QUANTIZED_AT_ONCE", 60)
    parts = quantize_weight(weight)
    assert isinstance(parts, QuantizedWeight)
    assert torch.equal(parts.scales_N, whole.scales_N)
    assert torch.equal(parts.values_NK.view(torch.uint8), whole.values_NK.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize(("name", "num_prompts"), [("qwen2", 5), ("qwen3", 1), ("llama", 5)])
def test_kernels_of_a_gpu_give_the_logits_of_torch(
    name: str, num_prompts: int, kv: str, graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows and many: prompts of 5 sequences are a step for `WideQuantizedLayers`, decodes one for `ThinLayers`."""
    sizes: dict[str, Any] = {
        "initializer_range": 0.05,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    make_model(name, tmp_path, **sizes, num_key_value_heads=2, head_dim=64, vocab_size=512)
    monkeypatch.setattr("tests.workers.engine.test_quantized.PROMPTS", PROMPTS[:num_prompts])
    knobs: dict[str, Any] = {**FP8_WEIGHTS, "kv_cache_config": {"dtype": kv}, "dtype": "bfloat16", "device": "cuda"}
    expected = step_logits(load(tmp_path, is_on_device=False, **knobs))
    ours = step_logits(load(tmp_path, is_on_device=True, **knobs, **({} if graphs else {"cuda_graph_config": None})))
    # Roundings to bfloat16 move numbers to a neighbour in e4m3, which is 0.04 to 0.09 of the logits.
    assert [relative_error(one, other) < 0.15 for one, other in zip(ours, expected, strict=True)] == [True] * 4
