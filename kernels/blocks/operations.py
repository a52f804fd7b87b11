"""`BlockOperations`: KV blocks packed to bytes, unpacked and digested; chosen once for a pool.

On a GPU one kernel moves all of them: 64 KB sends one by one reach 6 GB/s over NVLink, the same bytes packed first 265
GB/s in 16 MB. The pool may be another GPU's, mapped here: packing is then the transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tensorweave.kernels.blocks import reference
from tensorweave.kernels.blocks.digest import digest_block_numpy
from tensorweave.kernels.blocks.native import native_blocks
from tensorweave.kernels.blocks.reference import DigestBlocks, SomeBlocks, UnpackBlocks, UnpackVerified

# L layers, B blocks of the pool, K KV heads of this rank, P tokens per block, H head dim, N blocks chosen

PackBlocks = Callable[[Tensor, Sequence[int], range, Tensor], None]
UnpackVerifiedBlocks = Callable[[Tensor, Sequence[int], range, Tensor, Sequence[int], Tensor], list[bool]]
PullBlocks = Callable[[SomeBlocks, SomeBlocks, Sequence[int], Tensor, int], None]
_WORD_BYTES = 8
_UNPACKING_SMS = 32


@dataclass(frozen=True, slots=True)
class BlockOperations:
    """The first argument of each is the pool [L, B, 2, K, P, H]; the contracts are those of `kernels.blocks.reference`.

    `digest` also takes packed blocks, seen by `as_blocks`, as a pool; so does `pull` as its source.
    """

    pack: PackBlocks
    unpack: UnpackBlocks
    digest: DigestBlocks
    unpack_verified: UnpackVerifiedBlocks
    pull: PullBlocks = reference.pull_blocks


def choose_block_operations(pool_LB2KPH: Tensor) -> BlockOperations:
    """For this pool, and views of its shape and type on its device."""
    if pool_LB2KPH.is_cuda:
        return _gpu_operations(pool_LB2KPH)
    native = native_blocks()
    if native is not None:
        return BlockOperations(native.pack, native.unpack, native.digest, native.unpack_verified)
    return reference_block_operations(digest=partial(reference.digest_each, digest_block_numpy))


def reference_block_operations(digest: DigestBlocks = reference.digest_blocks) -> BlockOperations:
    unpack = reference.unpack_blocks
    return BlockOperations(reference.pack_blocks, unpack, digest, UnpackVerified(digest, unpack))


def _gpu_operations(pool_LB2KPH: Tensor) -> BlockOperations:
    """The Triton kernels move whole words: planes must consist of them, and for digests each token's head."""
    from tensorweave.kernels.blocks import cuda_pull, triton  # only where there is a GPU

    P, H = pool_LB2KPH.shape[-2:]
    assert pool_LB2KPH.stride()[3:] == (P * H, H, 1)
    token_bytes = H * pool_LB2KPH.itemsize
    pack, unpack, digest = reference.pack_blocks, reference.unpack_blocks, reference.digest_blocks
    if P * token_bytes % _WORD_BYTES == 0:
        pack, unpack = triton.pack_blocks, triton.unpack_blocks
    if token_bytes % _WORD_BYTES == 0:
        digest = triton.digest_blocks
    pull = cuda_pull.pull_blocks if cuda_pull.fits(pool_LB2KPH, pool_LB2KPH) else PullInSteps(pack, unpack, digest)
    return BlockOperations(pack, unpack, digest, UnpackVerified(digest, unpack), pull)


def verifying_in_one_pass(operations: BlockOperations) -> BlockOperations:
    return replace(operations, unpack_verified=PullVerified(operations.pull))


@dataclass(frozen=True, slots=True)
class PullVerified:
    """`UnpackVerified` in one pass, on a GPU: all blocks are written, and which of them are right is known afterwards.
    So nothing may read them before."""

    pull: PullBlocks

    def __call__(
        self,
        pool_LB2KPH: Tensor,
        block_ids: Sequence[int],
        heads: range,
        packed: Tensor,
        num_tokens: Sequence[int],
        digests_NLK: Tensor,
    ) -> list[bool]:
        blocks_LB2KPH = reference.as_blocks(packed, pool_LB2KPH, len(heads)).transpose(0, 1)
        source = SomeBlocks(blocks_LB2KPH, range(len(block_ids)), range(len(heads)))
        found_NLK = torch.empty(digests_NLK.shape, dtype=torch.int64, device=packed.device)
        self.pull(source, SomeBlocks(pool_LB2KPH, block_ids, heads), num_tokens, found_NLK, _UNPACKING_SMS)
        is_right: list[bool] = (found_NLK.cpu() == digests_NLK).flatten(1).all(1).tolist()
        return is_right


@dataclass(frozen=True, slots=True)
class PullInSteps:
    """`pull_blocks` by way of packed bytes, for GPUs and shapes that `pull.cu` is not for."""

    pack: PackBlocks
    unpack: UnpackBlocks
    digest: DigestBlocks

    def __call__(
        self, source: SomeBlocks, target: SomeBlocks, num_tokens: Sequence[int], digests_NLK: Tensor, num_sms: int
    ) -> None:
        num_layers, _, _, _, P, H = target.pool_LB2KPH.shape
        size = len(target.block_ids) * num_layers * 2 * len(target.heads) * P * H * target.pool_LB2KPH.itemsize
        packed = torch.empty(size, dtype=torch.uint8, device=target.pool_LB2KPH.device)
        self.pack(source.pool_LB2KPH, source.block_ids, source.heads, packed)
        blocks_LB2KPH = reference.as_blocks(packed, target.pool_LB2KPH, len(target.heads)).transpose(0, 1)
        found_NLK = self.digest(blocks_LB2KPH, range(len(num_tokens)), num_tokens)
        self.unpack(target.pool_LB2KPH, target.block_ids, target.heads, packed)
        digests_NLK.copy_(found_NLK, non_blocking=True)
