"""What is refused of quantized checkpoints: keys and values by name, tensors that do not fit them, devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.quantized.checkpoint_quantization import CheckpointQuantization
from tensorweave.workers.models.quantized.table import read_quantization
from tests.workers.engine_drive import engine_args, generate_on_ranks, random_prompts
from tests.workers.models.quantized.checkpoints import CASES, FP8, GPTQ, write_quantized
from tests.workers.tiny_models import rewrite_config, their_greedy

AWQ = CASES["awq"].config
CT = CASES["ct_w4"].config


def read(config: dict[str, Any]) -> CheckpointQuantization | None:
    return read_quantization({"quantization_config": config}, "config.json")


def changed(config: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(config))
    change(copy)
    return copy


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    weights: dict[str, Any] = config["config_groups"]["group_0"]["weights"]
    return weights


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            r"quant_method is 'bitsandbytes'; supported: awq, compressed-tensors, fp8, gguf, gptq",
        ),
        ({"bits": 4}, "quant_method is None; supported"),
        ({**FP8, "fmt": "e5m2"}, "fmt is 'e5m2'; supported: 'e4m3'"),
        ({**FP8, "weight_block_size": [128]}, r"weight_block_size is \[128\]; supported: two whole numbers"),
        ({**FP8, "expert_dtype": "fp4"}, "expert_dtype is 'fp4'; supported: 'fp8'"),
        (
            {**FP8, "modules_to_convert": ["lm_head"]},
            r"modules_to_convert is \['lm_head'\], a key that is not supported",
        ),
        ({**AWQ, "version": "gemv"}, "version is 'gemv'; supported: gemm"),
        ({**AWQ, "bits": 3}, "bits is 3; supported: 4"),
        ({**AWQ, "zero_point": False}, "zero_point is False; supported: True"),
        ({**AWQ, "group_size": 12}, "group_size is 12; supported: -1, or a multiple of 8"),
        ({**GPTQ, "bits": 3}, "bits is 3; supported: 2, 4, 8"),
        ({**GPTQ, "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported: gptq, gptq_v2"),
        ({**GPTQ, "bits": 4, "lm_head": True}, "lm_head is True, a key that is not supported"),
        ({**GPTQ, "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic is .*; supported: patterns that begin"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'; supported: fp8"),
        ({**CT, "format": "marlin-24"}, "format is 'marlin-24'; supported: float-quantized"),
        (
            {**CT, "transform_config": {"config_groups": {"R1": {}}}},
            "transform_config is .*neither sparse nor transformed",
        ),
        ({**CT, "config_groups": {}}, "config_groups is {}; supported: at least one group"),
        (changed(CT, lambda c: weights_of(c).update(num_bits=3)), "group_0.weights.num_bits is 3; supported: 2, 4, 8"),
        (changed(CT, lambda c: weights_of(c).update(type="float")), "group_0.weights.num_bits is 4; supported: 8"),
        (
            changed(CT, lambda c: c["config_groups"]["group_0"].update(output_activations={"num_bits": 8})),
            "group_0.output_activations is .*, a key that is not supported",
        ),
    ],
)
def test_keys_and_values_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(config)


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, path / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("awq", lambda t: t.pop(f"{Q}.scales"), rf"lacks tensors: {Q}\.scales"),
        ("awq", lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:2]}), rf"{Q}\.scales F16 \[2, 64\] \(expected"),
        ("gptq", lambda t: t[f"{Q}.bias"].add_(1), rf"has tensors that this model does not use: {Q}\.bias$"),
        ("gptq", lambda t: t[f"{Q}.qzeros"].fill_(-1), rf"{Q}\.qzeros has the largest value that 4 bits hold"),
        ("fp8_blocks", lambda t: t.pop(f"{Q}.weight_scale_inv"), rf"lacks tensors: {Q}\.weight_scale$"),
        ("ct_w4", lambda t: t[f"{Q}.weight_shape"].fill_(64).add_(1), rf"{Q}\.weight_shape is not \[64, 64\]"),
        (
            "ct_int8_channel",
            lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].int()}),
            rf"{Q}\.weight I32 .*expected F64",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    name: str, change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    write_quantized(tmp_path, CASES[name])
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_engine(engine_args(tmp_path), SoloComm())


def test_modules_that_the_configuration_leaves_out(tmp_path: Path) -> None:
    """Of a fused matrix, one part is quantized and the other is not; what the list says must be so."""
    model, _ = write_quantized(
        tmp_path, CASES["fp8_blocks"], keep=lambda module: module.endswith((".k_proj", "0.mlp.up_proj"))
    )
    prompts = random_prompts(3, 20)
    rewrite_config(tmp_path, lambda f: f["quantization_config"].update(modules_to_not_convert=["k_proj", "lm_head"]))
    assert generate_on_ranks(tmp_path, 2, prompts, 6) == their_greedy(model, prompts, 6)
    rewrite_config(tmp_path, lambda f: f["quantization_config"].update(modules_to_not_convert=["layers.0.mlp"]))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.\w+_proj is quantized, although its configuration says"):
        load_engine(engine_args(tmp_path), SoloComm())


def test_ignored_names_of_each_method() -> None:
    cases = {
        "model.layers.0.mlp.gate": {**FP8, "modules_to_not_convert": ["mlp.gate"]},
        "model.layers.1.mlp.gate": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["model.layers.*.gate"]},
        "model.layers.2.mlp.gate": {**CT, "ignore": [r"re:.*\.mlp\.gate$"]},
        "model.layers.3.mlp.gate": {**GPTQ, "bits": 4, "dynamic": {r"-:.*\.gate$": {}}},
    }
    for module, config in cases.items():
        quantization = read(config)
        assert quantization is not None
        assert module in quantization.ignored
        assert f"{module}_proj" not in quantization.ignored


def test_modelopts_own_file(tmp_path: Path) -> None:
    write_quantized(tmp_path, CASES["modelopt"])
    rewrite_config(tmp_path, lambda fields: fields.pop("quantization_config"))
    own = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": own}))
    quantization = load_model_config(tmp_path).quantization
    assert quantization is not None
    assert (quantization.method, quantization.bits) == ("modelopt", 8)
    load_engine(engine_args(tmp_path), SoloComm())


def test_scales_of_an_fp8_kv_cache(tmp_path: Path) -> None:
    write_quantized(tmp_path, CASES["ct_fp8_tensor"])
    change_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.tensor([0.5])}))
    load_engine(engine_args(tmp_path), SoloComm())
    with pytest.raises(ValueError, match=r"self_attn\.k_scale scales an FP8 KV cache; kv_cache_config\.dtype"):
        load_engine(engine_args(tmp_path, kv_cache_config={"dtype": "fp8", "max_tokens": 64}), SoloComm())


def test_a_second_quantization_is_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path, CASES["awq"])
    with pytest.raises(ValueError, match=r"comes quantized \(quant_method 'awq'\): leave quant_config\.quant_algo out"):
        load_engine(engine_args(tmp_path, quant_config={"quant_algo": "FP8"}), SoloComm())
    with pytest.raises(ValueError, match="load_format 'dummy' makes weights that are not quantized"):
        load_engine(engine_args(tmp_path, load_format="dummy"), SoloComm())
