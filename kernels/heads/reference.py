"""What happens to heads between the first matrix product and attention, in torch: norms (Qwen3), rotation, and keys and
values into the cache. Called once per layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tensorweave.kernels.heads.kv_slots import KvSlots
from tensorweave.kernels.heads.rope import rope
from tensorweave.kernels.norm.reference import rms_norm

# T tokens, N query heads, K KV heads, X = N + 2 K, H head dim, W elements of a head that are rotated
# B blocks, P tokens per block, C = 2 K planes of a block


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights [H] of the norms of query and key heads; `offset` is added to them."""

    query_H: Tensor
    key_H: Tensor
    epsilon: float
    offset: float = 0.0


def place_heads(
    heads_TXH: Tensor,
    rope_table_TW: Tensor,
    cache_BCPH: Tensor,
    slots: KvSlots,
    norms: HeadNorms | None,
    *,
    has_neighbours: bool = False,
) -> Tensor:
    """Norm and rotate queries in place; norm and rotate keys, and write keys and values into their slots.

    Args:
        heads_TXH: contiguous; N query heads, K keys, K values. Its keys and values are undefined afterwards.
        rope_table_TW: float32; cosines of the W/2 angles of each token, then their sines; W is at most H.
        has_neighbours: see `rope`.

    Returns:
        The queries [T, N, H], a view of `heads_TXH`.
    """
    C = cache_BCPH.shape[1]
    N, K = heads_TXH.shape[1] - C, C // 2
    if norms is not None:
        heads_TXH[:, :N] = rms_norm(heads_TXH[:, :N], norms.query_H, norms.epsilon, norms.offset)
        heads_TXH[:, N : N + K] = rms_norm(heads_TXH[:, N : N + K], norms.key_H, norms.epsilon, norms.offset)
    heads_TXH[:, : N + K] = rope(heads_TXH[:, : N + K], rope_table_TW, has_neighbours=has_neighbours)
    slots.write(heads_TXH[:, N:], cache_BCPH)
    return heads_TXH[:, :N]
