"""gpt-oss with experts in MXFP4 equals transformers' class with what transformers makes of the same blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from tensorweave.kernels.weights import GroupedWeight
from tensorweave.workers.engine_dir.directory import open_weights, save_engine_dir
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.assembly import tensor_shapes
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.rank_weights import TensorRows
from tests.workers.engine_drive import generate_on_ranks, random_prompts
from tests.workers.tiny_models import make_model, rewrite_config, their_greedy

PROMPTS = random_prompts(4, 60, seed=4)
NUM_TOKENS = 6
CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
SIZES = {"intermediate_size": 96}


def quantize(path: Path) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Write a tiny model whose experts are random blocks; return transformers' model with what these stand for, and
    the written tensors."""
    model = make_model("gpt_oss", path, **SIZES)
    tensors = load_file(path / "model.safetensors")
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        num_experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(256, (num_experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 125, blocks.shape[:-1], dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        parameter.data = _convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, path / "model.safetensors")
    rewrite_config(path, lambda fields: fields.update(quantization_config=CONFIG))
    return model, tensors


def test_greedy_ids(tmp_path: Path) -> None:
    """Of three blocks of 32 inputs of the way down, two ranks have two and one, and four ranks parts of blocks."""
    model, _ = quantize(tmp_path / "model")
    expected = their_greedy(model, PROMPTS, NUM_TOKENS)
    for size, expert in ((1, 1), (2, 1), (4, 1), (2, 2)):
        assert generate_on_ranks(tmp_path / "model", size, PROMPTS, NUM_TOKENS, expert=expert) == expected
    save_engine_dir(tmp_path / "model", tmp_path / "engine", tensor_parallel_size=2, dtype="float32")
    assert generate_on_ranks(tmp_path / "engine", 2, PROMPTS, NUM_TOKENS, dtype="auto") == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = quantize(tmp_path)
    config = load_model_config(tmp_path)
    whole = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").detach()[3].T
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert tensor_shapes(config)[name] == (96, 64)
    with open_weights(tmp_path, config, dtype, torch.device("cpu"), SoloComm.place) as weights:
        for rows in (range(96), range(10, 31)):
            read = weights.matrix_rows([TensorRows(name, (96, 64), rows)])
            assert isinstance(read, GroupedWeight)
            assert read.dtype == dtype
            assert torch.equal(read.wide_rows(), whole[1::2][rows.start : rows.stop])
        down = model.get_parameter("model.layers.1.mlp.experts.down_proj").detach()[3].T
        read = weights.matrix_columns("model.layers.1.mlp.experts.3.down_proj.weight", (64, 96), range(24, 72))
        assert isinstance(read, GroupedWeight)
        assert torch.equal(read.wide_rows(), down[:, 24:72])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.0.mlp.experts.down_proj_scales"),
            "lacks tensors: .*down_proj_scales",
        ),
        (
            lambda tensors: tensors.pop("model.layers.0.mlp.experts.down_proj_blocks"),
            r"lacks tensors: .*down_proj\.weight",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.mlp.experts.down_proj_scales": torch.zeros(5, 64, 2, dtype=torch.uint8)}
            ),
            r"another shape or type: .*down_proj_scales U8 \[5, 64, 2\] \(expected U8 or F8_E8M0 \[5, 64, 3\]\)",
        ),
    ],
)
def test_other_tensors_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    _, tensors = quantize(tmp_path)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        generate_on_ranks(tmp_path, 1, PROMPTS, NUM_TOKENS)
