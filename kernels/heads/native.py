"""`place_heads` by the native kernel, for head dims that are a multiple of two vectors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tensorweave.kernels.heads.kv_slots import KvSlots
from tensorweave.kernels.heads.reference import HeadNorms
from tensorweave.kernels.native.library import NativeKernels
from tensorweave.kernels.weights import FP8

# T tokens, N query heads, K KV heads, X = N + 2 K, H head dim, W elements of a head that are rotated
# B blocks, P tokens per block, C = 2 K planes of a block


@dataclass(frozen=True, slots=True)
class NativePlaceHeads:
    native: NativeKernels

    @staticmethod
    def fits(native: NativeKernels, head_dim: int) -> bool:
        return head_dim % (2 * native.vector_length) == 0

    def __call__(
        self,
        heads_TXH: Tensor,
        rope_table_TW: Tensor,
        cache_BCPH: Tensor,
        slots: KvSlots,
        norms: HeadNorms | None,
        *,
        has_neighbours: bool = False,
    ) -> Tensor:
        T, X, H = heads_TXH.shape
        _, C, P, _ = cache_BCPH.shape
        N, K = X - C, C // 2
        assert heads_TXH.is_contiguous()
        query_norm, key_norm = (None, None) if norms is None else (norms.query_H.data_ptr(), norms.key_H.data_ptr())
        self.native.place_heads(
            heads_TXH.data_ptr(),
            rope_table_TW.data_ptr(),
            slots.slots_T.data_ptr(),
            cache_BCPH.data_ptr(),
            query_norm,
            key_norm,
            0.0 if norms is None else norms.epsilon,
            0.0 if norms is None else norms.offset,
            *(T, N, K, P, H, rope_table_TW.shape[1], has_neighbours, cache_BCPH.dtype == FP8),
        )
        return heads_TXH[:, :N]
