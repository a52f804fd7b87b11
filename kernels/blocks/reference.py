"""Moving KV blocks between their places in a pool and contiguous memory, and digesting them, in torch.

Packed, heads [i, j) of one block are [layers, 2, j - i, P, H]: for each layer their keys, then their values; several
blocks follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.blocks.digest import digest_block_reference

# L layers, B blocks of the pool, K KV heads of this rank, P tokens per block, H head dim, N blocks chosen


@dataclass(frozen=True, slots=True)
class SomeBlocks:
    """Heads of some blocks of a pool [L, B, 2, K, P, H]."""

    pool_LB2KPH: Tensor
    block_ids: Sequence[int]
    heads: range


Numbers = Sequence[int] | Tensor
"""Of blocks; a tensor of int64 is on the pool's device."""
DigestBlocks = Callable[[Tensor, Numbers, Numbers], Tensor]
UnpackBlocks = Callable[[Tensor, Sequence[int], range, Tensor], None]


def pack_blocks(pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
    """Fill `out`, uint8 on the pool's device, with the heads of these blocks, in this order."""
    for packed, block_id in zip(as_blocks(out, pool_LB2KPH, len(heads)), block_ids, strict=True):
        packed.copy_(pool_LB2KPH[:, block_id, :, heads.start : heads.stop])


def unpack_blocks(pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, packed: Tensor) -> None:
    """The inverse. `block_ids` differ from each other: other forms write them at the same time."""
    for block, block_id in zip(as_blocks(packed, pool_LB2KPH, len(heads)), block_ids, strict=True):
        pool_LB2KPH[:, block_id, :, heads.start : heads.stop].copy_(block)


def pull_blocks(
    source: SomeBlocks, target: SomeBlocks, num_tokens: Sequence[int], digests_NLK: Tensor, num_sms: int
) -> None:
    """Copy blocks into another pool of the same layers, whose heads may be others, and leave the digests of what was
    copied in `digests_NLK` [N, L, heads], int64. A form for a GPU returns before it has; `num_sms` is for such."""
    for from_id, to_id in zip(source.block_ids, target.block_ids, strict=True):
        copied = source.pool_LB2KPH[:, from_id, :, source.heads.start : source.heads.stop]
        target.pool_LB2KPH[:, to_id, :, target.heads.start : target.heads.stop].copy_(copied)
    heads_LB2KPH = target.pool_LB2KPH[:, :, :, target.heads.start : target.heads.stop]
    digests_NLK.copy_(digest_blocks(heads_LB2KPH, target.block_ids, num_tokens))


def digest_blocks(pool_LB2KPH: Tensor, block_ids: Numbers, num_tokens: Numbers) -> Tensor:
    """[N, L, K] int64 on the pool's device: the digest of each of these blocks; any strided view will do."""
    return digest_each(digest_block_reference, pool_LB2KPH, block_ids, num_tokens)


def digest_each(
    digest_block: Callable[[Tensor, int], Tensor],
    pool_LB2KPH: Tensor,
    block_ids: Numbers,
    num_tokens: Numbers,
) -> Tensor:
    num_layers, _, _, num_heads, _, _ = pool_LB2KPH.shape
    if not len(block_ids):
        return torch.empty((0, num_layers, num_heads), dtype=torch.int64, device=pool_LB2KPH.device)
    pairs = zip(as_ints(block_ids), as_ints(num_tokens), strict=True)
    return torch.stack([digest_block(pool_LB2KPH[:, block_id], count) for block_id, count in pairs])


def as_ints(numbers: Numbers) -> Sequence[int]:
    ints: Sequence[int] = numbers.tolist() if isinstance(numbers, Tensor) else numbers
    return ints


@dataclass(frozen=True, slots=True)
class UnpackVerified:
    """`unpack_verified_blocks` in two steps."""

    digest: DigestBlocks
    unpack: UnpackBlocks

    def __call__(
        self,
        pool_LB2KPH: Tensor,
        block_ids: Sequence[int],
        heads: range,
        packed: Tensor,
        num_tokens: Sequence[int],
        digests_NLK: Tensor,
    ) -> list[bool]:
        """Unpack the blocks whose digests are these [N, L, heads], on the host; return which ones. Nothing else is
        written."""
        blocks_LB2KPH = as_blocks(packed, pool_LB2KPH, len(heads)).transpose(0, 1)
        found_NLK = self.digest(blocks_LB2KPH, range(len(num_tokens)), num_tokens).cpu()
        is_right: list[bool] = (found_NLK == digests_NLK).flatten(1).all(1).tolist()
        right = [at for at, flag in enumerate(is_right) if flag]
        if right:
            if len(right) < len(is_right):
                packed = packed.view(len(is_right), -1)[right].flatten()
            self.unpack(pool_LB2KPH, [block_ids[at] for at in right], heads, packed)
        return is_right


def as_blocks(packed: Tensor, pool_LB2KPH: Tensor, num_heads: int) -> Tensor:
    """[N, L, 2, num_heads, P, H] view of packed bytes of blocks of this pool."""
    num_layers, _, _, _, P, H = pool_LB2KPH.shape
    return packed.view(pool_LB2KPH.dtype).view(-1, num_layers, 2, num_heads, P, H)
