"""Checkpoints that come quantized, and weights quantized at load, on the device engine: tokens of transformers' model
with the dequantized weights. On a CPU with the reference kernels, on a GPU with the fast ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tensorweave.workers.engine.gpu_weights import check_gpu_weights
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.families.table import load_model_config
from tests.workers.engine.device.test_engine import PROMPTS, device_engine
from tests.workers.engine_drive import engine_args, generate
from tests.workers.models.quantized.checkpoints import CASES, write_quantized
from tests.workers.tiny_models import make_model, their_greedy

PACKED = ["fp8_blocks", "gptq", "gptq_v2", "gptq_symmetric_rows", "ct_int8_asymmetric", "ct_w4", "ct_w8_channel"]
REFUSED = ["awq", "gptq_act_order", "gptq_8_bits"]  # groups of 16, or act-order
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", [*PACKED, "ct_mxfp4"])
def test_tokens_are_those_of_the_dequantized_model(name: str, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path, CASES[name], family="qwen2" if name.startswith("ct_") else "llama")
    assert generate(device_engine(tmp_path), PROMPTS, 8, chunk=24) == their_greedy(model, PROMPTS, 8)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_refused_by_name(name: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, CASES[name])
    with pytest.raises(ValueError, match="no kernels for matrices whose parts are quantized in several ways"):
        device_engine(tmp_path)


@pytest.mark.parametrize("algorithm", ["W4A16", "W8A16"])
def test_integers_made_at_load(algorithm: str, tmp_path: Path) -> None:
    make_model("qwen3", tmp_path, hidden_size=96, intermediate_size=160)
    quantized = {"quant_config": {"quant_algo": algorithm}}
    expected = generate(load_engine(engine_args(tmp_path, **quantized), SoloComm()), PROMPTS, 8)
    assert generate(device_engine(tmp_path, **quantized), PROMPTS, 8, chunk=24) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["fp8_blocks", "gptq", "ct_w8_channel"])
def test_on_a_gpu_in_bfloat16(name: str, graphs: bool, tmp_path: Path) -> None:
    """Most tokens are those of the same engine on a CPU, in the same type; the first always."""
    write_quantized(tmp_path, CASES[name], hidden_size=128, intermediate_size=192, head_dim=64)
    expected = generate(device_engine(tmp_path, dtype="bfloat16", device="cpu"), PROMPTS, 4)
    knobs = {} if graphs else {"cuda_graph_config": None}
    found = generate(device_engine(tmp_path, dtype="bfloat16", device="cuda", **knobs), PROMPTS, 4)
    same = sum(a == b for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.75 * 4 * len(PROMPTS)


def test_what_a_gpu_does_not_compute(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "dense")
    make_model("qwen3_moe", tmp_path / "moe")
    write_quantized(tmp_path / "awq", CASES["awq"])
    dense, moe, awq = (load_model_config(tmp_path / name) for name in ("dense", "moe", "awq"))
    with pytest.raises(ValueError, match=r"whose inputs are rounded to 8 bits \(w4a8_g32\) are for CPUs"):
        check_gpu_weights(dense, "w4a8_g32", CUDA, is_on_device=True)
    with pytest.raises(ValueError, match=r"integers \(w4a16_g32\) have no kernels on this GPU"):
        check_gpu_weights(dense, "w4a16_g32", CUDA, is_on_device=False)
    with pytest.raises(ValueError, match="whose experts PyTorch alone does not compute on a GPU"):
        check_gpu_weights(moe, None, CUDA, is_on_device=False)
    with pytest.raises(ValueError, match="on a GPU its weights are not quantized"):
        check_gpu_weights(moe, "fp8", CUDA, is_on_device=True)
    with pytest.raises(ValueError, match=r"comes quantized .*there are no kernels for the model on this GPU"):
        check_gpu_weights(awq, None, CUDA, is_on_device=False)
    for config in (dense, moe, awq):
        check_gpu_weights(config, None, CUDA, is_on_device=True)
    check_gpu_weights(dense, "w4a16_g32", CUDA, is_on_device=True)
