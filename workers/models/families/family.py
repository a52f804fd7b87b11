"""`Family`: what this project knows of one architecture of Hugging Face's. Each is a file beside this one, listed in
`families.table`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tensorweave.workers.models.config import LayerDesign, ModelEnds
from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.rope_config import DEFAULT_THETA, RopeConfig, RopeDefaults
from tensorweave.workers.models.sizes import ExpertSizes, ModelSizes

ReadLayers = Callable[[ConfigFields, ModelSizes], tuple[LayerDesign, ...]]


def one_rope(fields: ConfigFields, theta: float = DEFAULT_THETA) -> tuple[RopeConfig, ...]:
    """The same in all layers, of whole heads."""
    max_len = fields.count("max_position_embeddings")
    rope = RopeConfig.from_hf(fields.raw, max_len, fields.source, RopeDefaults(theta))
    if rope.part != 1:
        raise ValueError(
            f"{fields.source}: partial_rotary_factor is {rope.part:g}; supported: 1.0 for this architecture"
        )
    return (rope,)


def plain_ends(fields: ConfigFields, sizes: ModelSizes) -> ModelEnds:
    return ModelEnds()


@dataclass(frozen=True, slots=True)
class Family:
    """`keys` are those of config.json that `layers`, `ropes` and `ends` read, beside what is read for every family;
    these functions raise ValueError for values that they do not support.

    `default_kv_heads`, `default_head_dim` and, for other keys, `defaults` are what the family's class in transformers
    takes where config.json does not say; without them: one KV head per query head, and hidden_size /
    num_attention_heads. `norm_offset` is added to the weights of norms, `activations` are the values of hidden_act.

    `common` gives config.json in the spelling of the others. Repositories may name `own_code` as theirs: it is what
    transformers' class was made of. Where the model is part of a larger one, the names of its tensors begin with one of
    `nested_names`, each of which stands for what it is mapped to; other tensors are left. With `has_stacked_experts`, a
    checkpoint's tensors have all experts of a layer (`workers.models.stacked_experts`).

    `experts` reads the sizes of experts, for families whose layers have them, before `layers` is called.
    """

    architecture: str
    model_type: str
    keys: frozenset[str]
    layers: ReadLayers
    experts: Callable[[ConfigFields], ExpertSizes] | None = None
    default_kv_heads: int | None = None
    default_head_dim: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ropes: Callable[[ConfigFields], tuple[RopeConfig, ...]] = one_rope
    ends: Callable[[ConfigFields, ModelSizes], ModelEnds] = plain_ends
    norm_offset: float = 0.0
    common: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    own_code: frozenset[str] = frozenset()
    nested_names: Mapping[str, str] = field(default_factory=dict)
    has_stacked_experts: bool = False
    activations: frozenset[str] = frozenset({"silu", "swish"})
