"""`Family`: what this project knows of one architecture of Hugging Face's. Each is a file beside this one, listed in
`families.table`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensorweave.workers.models.config import LayerDesign
from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.sizes import ModelSizes


@dataclass(frozen=True, slots=True)
class Family:
    """`keys` are those of config.json that `layers` reads, beside what is read for every family. `layers` raises
    ValueError for values that it does not support.

    `default_kv_heads` and `default_head_dim` are what the family's class in transformers takes where config.json does
    not say; None: one KV head per query head, and hidden_size / num_attention_heads.
    """

    architecture: str
    model_type: str
    keys: frozenset[str]
    layers: Callable[[ConfigFields, ModelSizes], tuple[LayerDesign, ...]]
    default_kv_heads: int | None = None
    default_head_dim: int | None = None
