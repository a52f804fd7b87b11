"""`MemoryNeed`: the memory that a rank will need, computed from the model's configuration before any weight is read.

It is a lower bound: what is refused here would have been killed while loading. `pool_size` counts exactly, once the
weights are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final

import torch

from tensorweave.cluster.host_memory import HostMemory, host_memory
from tensorweave.cluster.kv_cache_config import KvCacheConfig
from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.quant_config import IntegerWeights
from tensorweave.kernels.weights import FP8
from tensorweave.workers.models.assembly import count_weights
from tensorweave.workers.models.checkpoint import Shapes
from tensorweave.workers.models.config import ModelConfig

_GIB: Final = 1 << 30
_NARROWED: Final = 2
"""Bytes of a number that came from bfloat16: the native kernels keep it so, although they compute in float32."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of one rank. `kv_tokens` is the number of tokens that the cache was asked to hold, if it was."""

    weights: int
    kv_cache: int
    activations: int = 0
    kv_tokens: int | None = None

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations

    def check(self, memory: HostMemory, num_ranks: int, where: str) -> None:
        """Raises ValueError if `memory` cannot hold `num_ranks` such ranks; `where` names it in the message."""
        if self.total * num_ranks <= memory.available:
            return
        limit = "" if memory.limited_by is None else f" ({memory.limited_by})"
        have = f"{_gib(memory.available)} are free {where}{limit}"
        ranks = "a rank" if num_ranks == 1 else f"a rank, {_gib(self.total * num_ranks)} for the {num_ranks} ranks here"
        left = memory.available // num_ranks - self.weights - self.activations
        if self.kv_tokens is not None and left >= 0:
            raise ValueError(
                f"not enough memory: kv_cache_config.max_tokens is {self.kv_tokens}, which takes {_gib(self.kv_cache)} "
                f"beside weights of {_gib(self.weights)} {ranks}; {have}, enough for "
                f"{left * self.kv_tokens // self.kv_cache} tokens"
            )
        raise ValueError(
            f"not enough memory: the model needs at least {_gib(self.total)} (weights {_gib(self.weights)}, KV cache "
            f"{_gib(self.kv_cache)}) {ranks}; {have}. Take a smaller model or dtype, or more ranks on other hosts or "
            f"GPUs (tensor_parallel_size, pipeline_parallel_size)"
        )


def check_memory(need: MemoryNeed, device: torch.device, num_ranks_here: int) -> None:
    """Compare with the free memory of the rank's GPU, or with that of the host, which `num_ranks_here` ranks share.

    Raises:
        ValueError: the need does not fit; the message has both figures.
    """
    if device.type == "cuda":
        need.check(HostMemory(torch.cuda.mem_get_info(device)[0]), 1, f"on GPU {device.index or 0}")
    else:
        need.check(host_memory(), num_ranks_here, "on this host")


def kv_bytes(kv: KvCacheConfig, block_bytes: int) -> int:
    """Bytes of the cache that is asked for, or of one block if the cache takes the memory that is left."""
    return block_bytes * (1 if kv.max_tokens is None else -(-kv.max_tokens // kv.tokens_per_block))


def rank_weight_bytes(config: ModelConfig, place: MeshRank, dtype: torch.dtype, quantization: str | None = None) -> int:
    """Bytes of the matrices that one rank keeps; norms, biases and a tied head are left out."""
    narrow = dtype == torch.float32 and config.checkpoint_dtype == "bfloat16"
    weights = count_weights(config, place)
    each = _NARROWED if narrow else dtype.itemsize
    in_layers = weights.num_multiplied - weights.num_in_head
    looked_up = weights.num_looked_up * dtype.itemsize
    if config.quantization is not None:
        bits = config.quantization.bits
        return looked_up + (weights.num_in_head * min(8 * each, bits) + in_layers * bits) // 8
    integers = None if quantization is None else IntegerWeights.parse(quantization)
    if integers is not None:
        has_tied_head = config.has_tied_embeddings and place.is_last_stage
        head = weights.num_looked_up if has_tied_head else weights.num_in_head
        numbers = 2 if integers.has_minimums else 1
        scale_bits = 0 if integers.group_size is None else 16 * numbers / integers.group_size
        return looked_up + head + int(in_layers * (integers.bits + scale_bits) / 8)
    return looked_up + weights.num_in_head * each + in_layers * (each if quantization is None else FP8.itemsize)


def checkpoint_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    """Bytes of all tensors in `dtype`: for a model that one rank holds whole."""
    return sum(prod(shape) for shape in shapes.values()) * dtype.itemsize


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
