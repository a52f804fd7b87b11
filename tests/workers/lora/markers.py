"""A model whose adapters can be told apart by their answers: each makes every token its own marker.

Channel 0 of every embedding is large, so that the normalised input of the first layer has a number above 0 there. An
adapter turns that into a large gate and value of one channel of the MLP, and that channel into the marker's row of the
output head.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.workers.tiny_models import SHAPE, make_model

_PREFIX = "base_model.model.model.layers.2.mlp"
_CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["gate_proj", "up_proj", "down_proj"]}


def make_marked_model(path: Path, **changes: Any) -> PreTrainedModel:
    model = make_model("llama", path, **changes)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 50.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
    model.save_pretrained(path)
    return model


def write_marker(model: PreTrainedModel, path: Path, marker: int) -> None:
    """Put an adapter there, in place of one that is there."""
    D, width = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    head_VD = model.lm_head.weight.detach()
    gate_A, down_A = torch.zeros(1, D), torch.zeros(1, width)
    gate_A[0, 0] = down_A[0, 1] = 1.0
    gate_B, down_B = torch.zeros(width, 1), head_VD[marker : marker + 1].T * 100
    gate_B[1] = 30.0
    parts = {"gate_proj": (gate_A, gate_B), "up_proj": (gate_A, gate_B), "down_proj": (down_A, down_B)}
    fresh = path.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = {f"{_PREFIX}.{name}.lora_A.weight": a.clone().contiguous() for name, (a, _) in parts.items()}
    tensors |= {f"{_PREFIX}.{name}.lora_B.weight": b.clone().contiguous() for name, (_, b) in parts.items()}
    save_file(tensors, fresh / "adapter_model.safetensors")
    (fresh / "adapter_config.json").write_text(json.dumps(_CONFIG | {"layers_to_transform": [2]}))
    shutil.rmtree(path, ignore_errors=True)
    fresh.rename(path)
