"""Which engine computes a model on a GPU: a device engine, or PyTorch's."""

from __future__ import annotations

import logging

import torch

from tensorweave.cluster.llm_args import TorchLlmArgs, adapter_config
from tensorweave.cluster.mesh import MeshRank
from tensorweave.workers.models.assembly import build_without_memory
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.device.model import missing_of_sizes, what_is_missing

logger = logging.getLogger(__name__)


def fits_device_engine(config: ModelConfig, args: TorchLlmArgs, place: MeshRank, device: torch.device) -> bool:
    """Whether a device engine computes the model: on one GPU if there are kernels for it, on several if `args` asks for
    it, too. Raises ValueError if it asks in vain; the message names what is missing."""
    is_split = place.mesh.size > 1
    is_asked_for = is_split and args.allreduce_strategy == "ONESHOT"
    is_possible = device.type == "cuda" and args.attn_backend != "VANILLA"
    if not is_asked_for and (is_split or not is_possible):
        return False
    missing = _missing_on_gpu(config, args, place) if is_possible else "CPUs, or attn_backend 'VANILLA'"
    if missing is None:
        return True
    if is_asked_for:
        raise ValueError(f"allreduce_strategy 'ONESHOT' has no kernels for {missing}; use 'AUTO', the default")
    logger.warning("steps are computed by PyTorch, which is slower: there are no GPU kernels for %s", missing)
    return False


def check_gpu_engine(config: ModelConfig, args: TorchLlmArgs, place: MeshRank, *, is_on_device: bool) -> None:
    """Raises ValueError for what the engine on a GPU does not compute; the message names it."""
    if is_on_device and (missing := _missing_of_sizes(config, args, place)) is not None:
        raise ValueError(f"a device engine has no kernels for {missing}")
    if not is_on_device and adapter_config(args) is not None:
        raise ValueError(
            "enable_lora: there are no GPU kernels for this model's adapters, or not over several ranks. Leave it and "
            "lora_config out, or set device to 'cpu'"
        )


def _missing_on_gpu(config: ModelConfig, args: TorchLlmArgs, place: MeshRank) -> str | None:
    widths = [rope.width(config.sizes.head_dim) for rope in config.ropes]
    return _missing_of_sizes(config, args, place) or what_is_missing(build_without_memory(config, place), widths)


def _missing_of_sizes(config: ModelConfig, args: TorchLlmArgs, place: MeshRank) -> str | None:
    sizes, P = config.sizes, args.kv_cache_config.tokens_per_block
    return missing_of_sizes(sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, P, place.mesh.size)
