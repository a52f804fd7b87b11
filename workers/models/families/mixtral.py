"""Mixtral: Mistral's layers with a mixture of experts for an MLP, and one sliding window in every layer, if any."""

from __future__ import annotations

from typing import Final

from tensorweave.kernels.mixture.routing import Routing
from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.families.experts import EXPERT_KEYS, MixtureDesign, read_experts, read_num_chosen
from tensorweave.workers.models.families.family import Family, one_rope
from tensorweave.workers.models.families.llama import LlamaLayer
from tensorweave.workers.models.families.windows import WINDOW_KEYS, read_layer_types, read_window
from tensorweave.workers.models.mixture import ExpertNames
from tensorweave.workers.models.rope_config import RopeConfig
from tensorweave.workers.models.sizes import ExpertSizes, ModelSizes

_NAMES: Final = ExpertNames(
    router="block_sparse_moe.gate",
    gate="block_sparse_moe.experts.{}.w1",
    up="block_sparse_moe.experts.{}.w3",
    down="block_sparse_moe.experts.{}.w2",
)


def _read_experts(fields: ConfigFields) -> ExpertSizes:
    return read_experts(fields, width=fields.count("intermediate_size"))


def _read_layers(fields: ConfigFields, sizes: ModelSizes) -> tuple[LlamaLayer, ...]:
    window = read_window(fields, None)
    windows = (window,) * sizes.num_layers
    if read_layer_types(fields, windows, window) != windows:
        raise fields.wrong("layer_types", "the same kind in every layer for Mixtral, as sliding_window says")
    assert sizes.experts is not None
    routing = Routing(read_num_chosen(fields, sizes.experts), is_renormalized=True, is_rounded=False)
    return (LlamaLayer(sizes.kv(window), mixture=MixtureDesign(_NAMES, sizes.experts, routing)),) * sizes.num_layers


def _read_ropes(fields: ConfigFields) -> tuple[RopeConfig, ...]:
    return one_rope(fields, theta=1_000_000.0)


MIXTRAL: Final = Family(
    "MixtralForCausalLM",
    "mixtral",
    keys=WINDOW_KEYS | EXPERT_KEYS | {"router_jitter_noise"},  # which is for training
    layers=_read_layers,
    experts=_read_experts,
    default_kv_heads=8,
    defaults={"rms_norm_eps": 1e-5},
    ropes=_read_ropes,
)
