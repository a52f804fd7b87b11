"""What happens to heads between the first matrix product and attention: norms (Qwen3), rotation, and keys and values
into the cache.

Called once a layer. `WriteSlots` is made once a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tensorweave.kernels.heads.rope import rope
from tensorweave.kernels.native.library import native_for
from tensorweave.kernels.norm.reference import rms_norm

# T tokens, N query heads, K KV heads, X = N + 2 K, H head dim, B blocks, P tokens a block, C = 2 K planes of a block


@dataclass(frozen=True, slots=True)
class WriteSlots:
    """Where a step's keys and values go: a slot (block * P + offset) a token, and the T * C rows of H in the cache."""

    slots_T: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights [H] of the norms of query and key heads."""

    query_H: Tensor
    key_H: Tensor
    epsilon: float


def place_heads(
    heads_TXH: Tensor, table_TH: Tensor, cache_BCPH: Tensor, write: WriteSlots, norms: HeadNorms | None
) -> Tensor:
    """Norms and rotates queries in place, and keys; keys and values go into their slots. Returns the queries, a view.

    Args:
        heads_TXH: contiguous; N query heads, K keys, K values. What it holds of keys and values afterwards is not said.
        table_TH: float32; cosines of the H/2 angles of each token, then their sines.
    """
    T, X, H = heads_TXH.shape
    _, C, P, _ = cache_BCPH.shape
    N, K = X - C, C // 2
    native = native_for(heads_TXH)
    if native is None or H % (2 * native.vector_length):
        if norms is not None:
            heads_TXH[:, :N] = rms_norm(heads_TXH[:, :N], norms.query_H, norms.epsilon)
            heads_TXH[:, N : N + K] = rms_norm(heads_TXH[:, N : N + K], norms.key_H, norms.epsilon)
        heads_TXH[:, : N + K] = rope(heads_TXH[:, : N + K], table_TH)
        write_kv(cache_BCPH, heads_TXH[:, N:], write.rows)
        return heads_TXH[:, :N]
    assert heads_TXH.is_contiguous()
    query_norm, key_norm = (None, None) if norms is None else (norms.query_H.data_ptr(), norms.key_H.data_ptr())
    native.place_heads(
        heads_TXH.data_ptr(),
        table_TH.data_ptr(),
        write.slots_T.data_ptr(),
        cache_BCPH.data_ptr(),
        query_norm,
        key_norm,
        0.0 if norms is None else norms.epsilon,
        *(T, N, K, P, H),
    )
    return heads_TXH[:, :N]


def write_kv(cache_BCPH: Tensor, kv_TCH: Tensor, write_rows: Tensor) -> None:
    """Put each token's keys and values (C planes of H) into its slot. `cache_BCPH` is one layer's blocks."""
    H = cache_BCPH.shape[-1]
    cache_BCPH.view(-1, H).index_copy_(0, write_rows, kv_TCH.reshape(-1, H))
