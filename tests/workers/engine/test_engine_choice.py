"""Which engine a GPU has for a model, and what is refused by name. No GPU is needed: nothing is computed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.workers.engine.engine_choice import check_gpu_engine, fits_device_engine
from tensorweave.workers.models.families.table import load_model_config
from tests.workers.engine_drive import engine_args
from tests.workers.tiny_models import make_model

ONESHOT = {"allreduce_strategy": "ONESHOT"}
LARGER = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}


def choice(path: Path, size: int, device: str = "cuda", **knobs: Any) -> bool:
    args, place = engine_args(path, **knobs), MeshRank(0, Mesh(tensor=size))
    return fits_device_engine(load_model_config(path), args, place, torch.device(device))


def test_several_gpus_have_a_device_engine_where_it_is_asked_for(tmp_path: Path) -> None:
    make_model("llama", tmp_path, **LARGER)
    assert choice(tmp_path, 1)
    assert [choice(tmp_path, 3, allreduce_strategy=name) for name in ("AUTO", "NCCL", "ONESHOT")] == [
        False,
        False,
        True,
    ]
    assert not choice(tmp_path, 3)
    assert not choice(tmp_path, 1, "cpu", **ONESHOT), "one rank sums nothing"
    assert not choice(tmp_path, 1, attn_backend="VANILLA")


@pytest.mark.parametrize(
    ("name", "size", "device", "knobs", "missing"),
    [
        ("llama", 3, "cpu", {}, "CPUs, or attn_backend 'VANILLA'"),
        ("llama", 3, "cuda", {"attn_backend": "VANILLA"}, "CPUs, or attn_backend 'VANILLA'"),
        ("mixtral", 3, "cuda", {}, "experts over several ranks"),
        ("llama_8_over_2", 3, "cuda", {}, "8 query heads on 2 KV heads over 3 ranks"),
    ],
)
def test_sums_that_are_asked_for_in_vain_are_refused_by_name(
    name: str, size: int, device: str, knobs: dict[str, Any], missing: str, tmp_path: Path
) -> None:
    make_model(name, tmp_path, **({"head_dim": 16} if name == "llama_8_over_2" else LARGER))
    with pytest.raises(ValueError, match=f"'ONESHOT' has no kernels for {missing}; use 'AUTO'"):
        choice(tmp_path, size, device, **ONESHOT, **knobs)


def test_heads_that_are_too_small(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PyTorch computes them, unless a device engine was demanded."""
    make_model("llama", tmp_path)
    with caplog.at_level(logging.WARNING):
        assert not choice(tmp_path, 1)
    assert "there are no GPU kernels for heads of 8 elements" in caplog.text
    config, args, place = load_model_config(tmp_path), engine_args(tmp_path), MeshRank(0, Mesh(tensor=1))
    check_gpu_engine(config, args, place, is_on_device=False)
    with pytest.raises(ValueError, match="a device engine has no kernels for heads of 8 elements"):
        check_gpu_engine(config, args, place, is_on_device=True)


def test_adapters_without_kernels_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    make_model("llama", tmp_path, **LARGER)
    config, place = load_model_config(tmp_path), MeshRank(0, Mesh(tensor=2))
    args = engine_args(tmp_path, enable_lora=True)
    is_on_device = fits_device_engine(config, args, place, torch.device("cuda"))
    with pytest.raises(ValueError, match="enable_lora: there are no GPU kernels"):
        check_gpu_engine(config, args, place, is_on_device=is_on_device)
