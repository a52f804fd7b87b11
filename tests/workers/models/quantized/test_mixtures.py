"""Mixtures of experts whose experts come quantized one by one, and the router too or as plain numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.workers.engine_drive import generate_on_ranks, random_prompts
from tests.workers.models.quantized.checkpoints import CASES, write_quantized
from tests.workers.tiny_models import their_greedy

EXPERTS = {"num_experts": 8, "moe_intermediate_size": 32, "mlp_only_layers": []}
PROMPTS = random_prompts(4, 30, seed=6)


def stack_experts(model: PreTrainedModel, plain: dict[str, Tensor]) -> None:
    """transformers' model has all experts of a layer in one tensor."""
    for name, parameter in model.named_parameters():
        prefix, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj") or not prefix.endswith(".experts"):
            continue
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        experts = [torch.cat([plain[f"{prefix}.{e}.{part}.weight"] for part in parts]) for e in range(len(parameter))]
        parameter.data = torch.stack(experts)


@pytest.mark.parametrize(
    ("name", "size", "expert"), [("fp8_blocks", 1, 1), ("awq", 2, 2), ("gptq", 2, 1), ("ct_w4", 1, 1)]
)
@pytest.mark.parametrize("has_plain_router", [False, True])
def test_greedy_ids(name: str, size: int, expert: int, has_plain_router: bool, tmp_path: Path) -> None:
    def keep(module: str) -> bool:
        return has_plain_router and module.endswith("mlp.gate")

    model, plain = write_quantized(tmp_path, CASES[name], family="qwen3_moe", keep=keep, **EXPERTS)
    stack_experts(model, plain)
    expected = their_greedy(model, PROMPTS, 6)
    assert generate_on_ranks(tmp_path, size, PROMPTS, 6, expert=expert) == expected
