"""Tiny models whose linear layers are quantized by a layout, beside the same models with the dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.workers.models.quantized.compressed import compressed
from tests.workers.models.quantized.layouts import Layout, awq, fp8_in_blocks, fp8_whole, gptq
from tests.workers.tiny_models import make_model, rewrite_config

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Case:
    layout: Layout
    config: dict[str, Any]


def _ct(kind: str, **weights: Any) -> Case:
    group = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}, "input_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }
    return Case(compressed(kind, weights), config)


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "sym": False, "desc_act": False, "damp_percent": 0.01, "true_sequential": True}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
CASES: dict[str, Case] = {
    "fp8_blocks": Case(fp8_in_blocks((32, 32)), {**FP8, "weight_block_size": [32, 32]}),
    "fp8_uneven_blocks": Case(
        fp8_in_blocks((40, 48), torch.float8_e8m0fnu), {**FP8, "weight_block_size": [40, 48], "scale_fmt": "ue8m0"}
    ),
    "fp8_per_tensor": Case(
        fp8_whole(per_output=False, name="weight_scale_inv"), {**FP8, "weight_block_size": None, "dequantize": False}
    ),
    "modelopt": Case(
        fp8_whole(per_output=False, has_input_scale=True),
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "modelopt"}},
    ),
    "awq": Case(awq(16), {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}),
    "gptq": Case(gptq(4, 32), {**GPTQ, "bits": 4, "group_size": 32}),
    "gptq_8_bits": Case(gptq(8, 16), {**GPTQ, "bits": 8, "group_size": 16, "checkpoint_format": "gptq"}),
    "gptq_2_bits": Case(gptq(2, 16), {**GPTQ, "bits": 2, "group_size": 16}),
    "gptq_v2": Case(gptq(4, 32, offset=0), {**GPTQ, "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}),
    "gptq_symmetric_rows": Case(gptq(4, -1, symmetric=True), {**GPTQ, "bits": 4, "group_size": -1, "sym": True}),
    "gptq_act_order": Case(gptq(4, 16, seed=3), {**GPTQ, "bits": 4, "group_size": 16, "desc_act": True}),
    "ct_fp8_channel": _ct("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
    "ct_fp8_tensor": _ct("float-quantized", num_bits=8, type="float", strategy="tensor", symmetric=True),
    "ct_fp8_block": _ct(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32], symmetric=True
    ),
    "ct_int8_channel": _ct("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "ct_int8_asymmetric": _ct("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
    "ct_w4": _ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
    "ct_w4_asymmetric": _ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=False),
    "ct_w8_channel": _ct("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "ct_mxfp4": _ct("mxfp4-pack-quantized", **MXFP4, scale_dtype="torch.uint8", zp_dtype="torch.uint8"),
}


def is_linear(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and ".layers." in name


def write_quantized(
    path: Path,
    case: Case,
    *,
    family: str = "llama",
    keep: Callable[[str], bool] = lambda module: False,
    **changes: Any,
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Write a model with quantized layers to `path`, except the modules that `keep` names; return transformers' model
    with the dequantized weights, and those by name."""
    model = make_model(family, path, **{**SIZES, **changes})
    stored, plain = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not is_linear(name, tensor) or keep(module):
            stored[name] = tensor
            continue
        tensors, plain[name] = case.layout(tensor)
        stored |= {f"{module}.{suffix}": each.contiguous() for suffix, each in tensors.items()}
    save_file(stored, path / "model.safetensors")
    rewrite_config(path, lambda fields: fields.update(quantization_config=json.loads(json.dumps(case.config))))
    model.load_state_dict(plain, strict=False)
    return model, plain
