"""Weights in integers on the CPU engine, against transformers' model with the dequantized weights in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.quant_config import IntegerWeights, QuantConfig, weight_quantization
from tensorweave.kernels.quantize_integers import quantize_integers
from tensorweave.workers.engine.engine import ModelEngine
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.engine.memory_need import rank_weight_bytes
from tensorweave.workers.engine_dir.directory import save_engine_dir
from tensorweave.workers.engine_dir.manifest import EngineManifest
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tests.workers.engine_drive import (
    ScatteredBlocks,
    engine_args,
    generate_on_ranks,
    logits_of,
    make_request,
    random_prompts,
)
from tests.workers.tiny_models import make_model

PROMPTS = [*random_prompts(4, 60), [7]]
CONFIGS: list[dict[str, Any]] = [
    {"quant_algo": "W8A16"},
    {"quant_algo": "W8A16", "group_size": 16},
    {"quant_algo": "W4A16"},
    {"quant_algo": "W4A16", "group_size": 128},
    {"quant_algo": "W4A16", "has_zero_point": True},
    {"quant_algo": "INT8"},
    {"quant_algo": "W4A8_QSERVE_PER_GROUP"},
]
MOST_ERROR = {16: 1e-3, 8: 0.06}
"""Of logits, relative to their norm, by the bits of rows: these models, with random weights, double a product's error
layer by layer."""


def integers_of(config: dict[str, Any]) -> IntegerWeights:
    name = weight_quantization(QuantConfig(**config))
    assert name is not None
    integers = IntegerWeights.parse(name)
    assert integers is not None
    assert integers.name == name
    return integers


def dequantized(model: PreTrainedModel, integers: IntegerWeights) -> PreTrainedModel:
    """In float64, with the weights that ours has. A tied embedding stays as it is where it is looked up."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone())  # type: ignore[union-attr]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            is_head = name == "lm_head"
            made = quantize_integers(
                module.weight.data,
                bits=8 if is_head else integers.bits,
                group_size=None if is_head else integers.group_size,
                row_bits=16,
                has_minimums=integers.has_minimums and not is_head,
            )
            module.weight.data = made.wide_rows()
    return model.double()


def last_logits(engine: ModelEngine, chunk: int) -> Tensor:
    """Of each prompt, in chunks."""
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    rows = []
    for i, prompt in enumerate(PROMPTS):
        request = make_request(i, prompt)
        for start in range(0, len(prompt), chunk):
            batch = ScheduledBatch((StepRow.of_context(request, start, min(chunk, len(prompt) - start)),))
            logits = logits_of(engine, batch, resources)
        rows.append(logits[0].clone())
    return torch.stack(rows)


def batch_logits(engine: ModelEngine) -> Tensor:
    """Of all prompts in one step."""
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    requests = [make_request(i, prompt) for i, prompt in enumerate(PROMPTS)]
    batch = ScheduledBatch(tuple(StepRow.of_context(request, 0, len(request.tokens)) for request in requests))
    return logits_of(engine, batch, resources)[: len(requests)].clone()


def load(path: Path, **knobs: Any) -> ModelEngine:
    return load_engine(engine_args(path, **knobs), SoloComm())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
@pytest.mark.parametrize("name", ["llama_tied_9_over_3", "llama_biases", "qwen3"])
def test_logits_and_that_a_row_does_not_depend_on_its_batch_and_chunk(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    model, integers = make_model(name, tmp_path), integers_of(config)
    with torch.inference_mode():
        plain = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
        exact_model = dequantized(model, integers)
        exact = torch.stack([exact_model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    engine = load(tmp_path, quant_config=config)
    ours = last_logits(engine, 23)
    assert ((ours - exact).norm() / exact.norm()).item() < MOST_ERROR[integers.row_bits]
    assert ((plain - exact).norm() / exact.norm()).item() > 0.003, "the model is one that rounding changes"
    others = [last_logits(engine, 7), batch_logits(engine)]
    if name == "qwen3":  # whose heads native attention takes: torch's sums depend on the batch
        assert all(torch.equal(ours, other) for other in others)
    assert all(((ours - other).norm() / ours.norm()).item() < MOST_ERROR[integers.row_bits] for other in others)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("algorithm", ["W8A16", "W4A8_QSERVE_PER_GROUP"])
def test_an_engine_directory_keeps_them(algorithm: str, size: int, tmp_path: Path) -> None:
    make_model("llama_tied_9_over_3", tmp_path / "model")
    quantized = {"quant_config": {"quant_algo": algorithm}}
    expected = generate_on_ranks(tmp_path / "model", size, PROMPTS, 6, **quantized)
    name, out = integers_of(quantized["quant_config"]).name, tmp_path / "engine"
    save_engine_dir(tmp_path / "model", out, tensor_parallel_size=size, dtype="float32", quantization=name)
    manifest = EngineManifest.read(out)
    assert manifest is not None
    assert manifest.quantization == name
    (tmp_path / "model" / "model.safetensors").unlink()
    assert generate_on_ranks(out, size, PROMPTS, 6) == expected, "its own quantization needs no quant_config"
    assert generate_on_ranks(out, size, PROMPTS, 6, **quantized) == expected


def test_an_engine_directory_of_another_quantization_is_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    out = tmp_path / "engine"
    save_engine_dir(tmp_path / "model", out, tensor_parallel_size=1, dtype="float32", quantization="w8a16")
    with pytest.raises(ValueError, match="was saved without the quantization that quant_config asks for"):
        load(out, quant_config={"quant_algo": "W4A16"})


def test_the_memory_that_is_needed(tmp_path: Path) -> None:
    make_model("llama_tied_9_over_3", tmp_path)
    config = load_model_config(tmp_path)
    plain = rank_weight_bytes(config, MeshRank(), torch.float32)
    embedding = 211 * 72 * 4
    layers = plain - embedding
    assert rank_weight_bytes(config, MeshRank(), torch.float32, "w8a16") == embedding + embedding // 4 + layers // 4
    assert rank_weight_bytes(config, MeshRank(), torch.float32, "w4a16_g32") == (
        embedding + embedding // 4 + int(layers / 8 * 9 / 8)
    )


@pytest.mark.parametrize("name", ["w3a16", "w8a16_g33", "w4a16_g", "w8a16_g32x", "w4a16_minimums", "fp8"])
def test_names_of_something_else(name: str) -> None:
    assert IntegerWeights.parse(name) is None
