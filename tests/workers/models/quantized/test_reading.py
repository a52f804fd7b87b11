"""Checkpoints that come quantized: every weight exactly, whole and in parts, and the tokens of transformers with the
dequantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.weights import GroupedFloatWeight, GroupedWeight, QuantizedWeight, ReorderedWeight, Weight
from tensorweave.workers.engine_dir.directory import save_engine_dir
from tensorweave.workers.models.checkpoint import SafetensorsDirectory
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.loader import WeightLoader
from tensorweave.workers.models.quantized.loader import QuantizedLoader
from tensorweave.workers.models.rank_weights import TensorRows
from tests.workers.engine_drive import generate_on_ranks, random_prompts
from tests.workers.models.quantized.checkpoints import CASES, write_quantized
from tests.workers.tiny_models import their_greedy

FORMS: dict[str, type] = {"awq": GroupedWeight, "gptq": GroupedWeight, "ct_w": GroupedWeight, "ct_int8": GroupedWeight}
FORMS |= {"gptq_act_order": ReorderedWeight, "fp8_per_tensor": QuantizedWeight, "modelopt": QuantizedWeight}
FORMS |= {"ct_fp8_channel": QuantizedWeight, "ct_fp8_tensor": QuantizedWeight, "ct_fp8_block": GroupedFloatWeight}
FORMS |= {"ct_mxfp4": GroupedFloatWeight, "fp8_blocks": GroupedFloatWeight, "fp8_uneven_blocks": GroupedFloatWeight}


def form_of(name: str) -> type:
    return FORMS.get(name) or next(form for prefix, form in FORMS.items() if name.startswith(prefix))


def rows_of(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.rows()


@pytest.mark.parametrize("name", CASES)
def test_every_weight_exactly(name: str, tmp_path: Path) -> None:
    _, plain = write_quantized(tmp_path, CASES[name])
    config = load_model_config(tmp_path)
    assert config.quantization is not None
    with SafetensorsDirectory(tmp_path, is_quantized=True) as source:
        loader = QuantizedLoader(source, config.quantization, WeightLoader(source, torch.float32, torch.device("cpu")))
        for key, expected in plain.items():
            shape = (expected.shape[0], expected.shape[1])
            whole = loader.matrix_rows([TensorRows(key, shape, range(shape[0]))])
            assert isinstance(whole, form_of(name))
            assert torch.equal(whole.rows(), expected), key
        q, k, down = (f"model.layers.1.{part}_proj.weight" for part in ("self_attn.q", "self_attn.k", "mlp.down"))
        fused = loader.matrix_rows([TensorRows(q, (64, 64), range(16, 48)), TensorRows(k, (32, 64), range(5, 21))])
        assert torch.equal(rows_of(fused), torch.cat([plain[q][16:48], plain[k][5:21]]))
        for columns in (range(48), range(48, 96), range(64, 96), range(40, 72)):
            part = loader.matrix_columns(down, (64, 96), columns)
            assert isinstance(part, form_of(name))
            assert torch.equal(rows_of(part), plain[down][:, columns.start : columns.stop])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("fp8_blocks", 3),
        ("awq", 2),
        ("gptq_act_order", 2),
        ("gptq_act_order", 3),
        ("ct_int8_asymmetric", 1),
        ("ct_w4_asymmetric", 3),
        ("ct_mxfp4", 2),
    ],
)
def test_tokens_are_those_of_the_dequantized_model(name: str, size: int, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path, CASES[name], family="qwen2" if name.startswith("ct_") else "llama")
    prompts = random_prompts(4, 30)
    assert generate_on_ranks(tmp_path, size, prompts, 8) == their_greedy(model, prompts, 8)


@pytest.mark.parametrize("name", ["fp8_blocks", "gptq_act_order", "ct_fp8_channel", "ct_w4_asymmetric", "ct_mxfp4"])
def test_engine_directories_keep_the_forms(name: str, tmp_path: Path) -> None:
    """With one part of a fused matrix that is not quantized."""
    write_quantized(tmp_path / "model", CASES[name], keep=lambda module: module.endswith("1.mlp.up_proj"))
    save_engine_dir(tmp_path / "model", tmp_path / "engine", tensor_parallel_size=2, dtype="float32")
    prompts = random_prompts(3, 20)
    expected = generate_on_ranks(tmp_path / "model", 2, prompts, 6)
    assert generate_on_ranks(tmp_path / "engine", 2, prompts, 6) == expected
