"""Reads small config.jsons, and says what tensors the models that they describe have."""

from __future__ import annotations

from typing import Any

from tensorweave.workers.models.assembly import tensor_shapes
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.families.table import read_model_config

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
QKV = {"q_proj", "k_proj", "v_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def read(architecture: str = "LlamaForCausalLM", **fields: Any) -> ModelConfig:
    return read_model_config({"architectures": [architecture], **SIZES, **fields}, "some/config.json")


def biases(config: ModelConfig) -> set[str]:
    """The linear layers of layer 0 that have one."""
    names = (name for name in tensor_shapes(config) if name.startswith("model.layers.0."))
    return {name.split(".")[-2] for name in names if name.endswith(".bias")}


def has_head_norms(config: ModelConfig) -> bool:
    norms = {f"model.layers.0.self_attn.{kind}_norm.weight" for kind in "qk"}
    return norms <= tensor_shapes(config).keys()
