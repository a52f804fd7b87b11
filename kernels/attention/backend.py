"""The interface of attention over a paged KV cache: a backend plans a step, and the plan writes and attends.

One contract for prompt chunks and decodes: keys and values are written first, and attention reads only the cache. What
depends on the batch alone is planned once per step; every layer uses the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tensorweave.kernels.heads.kv_slots import KvSlots

# T tokens of the batch, N query heads, K KV heads, H head dim, B blocks, P tokens per block
# C = 2 K planes of a block: its K key heads, then its K value heads


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [first_row, first_row + length) of the batch: tokens [start, start + length) of the sequence in `blocks`."""

    first_row: int
    length: int
    start: int
    blocks: Sequence[int]

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a rank's attention layers have in common.

    Args:
        num_kv_heads: KV heads of a block, K.
        read_heads: the KV head that each run of query heads reads; longer than K where query heads do not divide
            evenly.
        windows: the distinct windows of the layers: how many positions a query looks back, itself included; None: all.
    """

    num_kv_heads: int
    read_heads: tuple[int, ...]
    head_dim: int
    tokens_per_block: int
    windows: frozenset[int | None]


class AttentionPlan(Protocol):
    """One step's batch, planned for all windows of the layers."""

    @property
    def slots(self) -> KvSlots:
        """Where the batch's keys and values go, for kernels that write them on the way (`Operations.place_heads`)."""
        ...

    def write(self, kv_TCH: Tensor, cache_BCPH: Tensor) -> None:
        """Put the batch's keys and values, as they are, into one layer's cache."""
        ...

    def attend(
        self,
        q_TNH: Tensor,
        cache_BCPH: Tensor,
        window: int | None,
        scale: float,
        *,
        soft_cap: float | None = None,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """softmax(q kᵀ scale) v of every query over its own sequence, causal, within `window`: [T, N, H].

        The keys and values of the queries' own tokens must be in the cache already.

        Args:
            soft_cap: scores are soft_cap * tanh(q kᵀ scale / soft_cap) (Gemma 2, arXiv 2408.00118).
            sinks_N: float32; a score for each head that takes part in its softmax, but has no value (gpt-oss).
        """
        ...


class AttentionBackend(Protocol):
    """Attention of one rank's layers on one device. Made once at load by `Operations.make_attention`."""

    def plan(self, spans: Sequence[Span], slots_T: Tensor) -> AttentionPlan:
        """`slots_T` are the slots, block * P + offset, of the spans' tokens, on the device."""
        ...
