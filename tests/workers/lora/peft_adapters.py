"""Random adapters made by peft, and what transformers answers with them merged."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tests.workers.tiny_models import their_greedy

ATTENTION: Final = ["q_proj", "k_proj", "v_proj"]
MLP: Final = ["gate_proj", "up_proj", "down_proj"]
VARIANTS: Final[Sequence[Mapping[str, Any]]] = [
    {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 7, "target_modules": ATTENTION},
    {"r": 16, "target_modules": "all-linear"},
    {"r": 64, "target_modules": "all-linear", "lora_alpha": 32},
    {"r": 8, "target_modules": "all-linear", "use_rslora": True},
    {"r": 5, "target_modules": ["o_proj", "down_proj"], "lora_alpha": 10},
    {"r": 6, "target_modules": ["gate_proj"], "lora_alpha": 24},
    {"r": 8, "target_modules": r".*\.(1|2)\.(self_attn|mlp)\.(q|up)_proj"},
    {"r": 8, "target_modules": [*ATTENTION, "o_proj", *MLP], "layers_to_transform": [0, 2]},
    {"r": 4, "target_modules": "all-linear", "rank_pattern": {"q_proj": 12, "layers.1.mlp.up_proj": 3}},
    {"r": 8, "target_modules": "all-linear", "alpha_pattern": {"v_proj": 40, r".*\.down_proj": 1}},
    {"r": 9, "target_modules": [*ATTENTION, "up_proj"], "use_rslora": True, "rank_pattern": {"k_proj": 33}},
    {"r": 32, "target_modules": ["q_proj"], "lora_alpha": 64},
    {"r": 4, "target_modules": "all-linear", "exclude_modules": ["o_proj", "gate_proj"]},
    {"r": 10, "target_modules": ["model.layers.0.mlp.up_proj", "v_proj"], "lora_dropout": 0.3},
    {"r": 48, "target_modules": ["down_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
]


def save_adapter(model: PreTrainedModel, path: Path, seed: int, **fields: Any) -> None:
    """Random in A and B; the model stays as it is."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", **{"lora_alpha": 16, **fields})
    adapted = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3 if "lora_A" in name else 0.2)
    adapted.save_pretrained(path)


def merged_with(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    merged: PreTrainedModel = PeftModel.from_pretrained(copy.deepcopy(model), path).merge_and_unload()
    return merged.eval()


def their_answers(
    model: PreTrainedModel, path: Path | None, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    """Greedy tokens with the adapter at `path` merged; None: without one."""
    return their_greedy(model if path is None else merged_with(model, path), prompts, num_tokens)
