"""Moves KV blocks between their places in a pool and one contiguous piece of memory, and digests them where they are.

Packed, heads [i, j) of one block are [layers, 2, j - i, P, H]: for each layer their keys, then their values; several
blocks follow each other. On a GPU one kernel moves all of them: 64 KB sends one by one reach 6 GB/s over NVLink, the
same bytes packed first 265 GB/s in 16 MB. The pool may be another GPU's, mapped here: packing is then the transfer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tensorweave.kernels.blocks.digest import digest_block, digest_blocks_native, plane_constants
from tensorweave.kernels.native.library import as_longs, byte_kernel

# L layers, B blocks of the pool, K KV heads of this rank, P block size in tokens, H head dim, N blocks chosen

_WORD_BYTES = 8


def pack_blocks(pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
    """Fill `out`, uint8 on the pool's device, with the heads of these blocks, in this order."""
    if pool_LB2KPH.is_cuda and _is_worded(pool_LB2KPH):
        from tensorweave.kernels.blocks.triton import copy_runs

        copy_runs(pool_LB2KPH, _ids(block_ids, pool_LB2KPH), heads, out, is_unpacking=False)
    elif not _move_natively(pool_LB2KPH, block_ids, heads, out, is_unpacking=False):
        pack_blocks_reference(pool_LB2KPH, block_ids, heads, out)


def unpack_blocks(pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, packed: Tensor) -> None:
    """The way back. `block_ids` differ from each other: they are written at the same time."""
    if pool_LB2KPH.is_cuda and _is_worded(pool_LB2KPH):
        from tensorweave.kernels.blocks.triton import copy_runs

        copy_runs(pool_LB2KPH, _ids(block_ids, pool_LB2KPH), heads, packed, is_unpacking=True)
    elif not _move_natively(pool_LB2KPH, block_ids, heads, packed, is_unpacking=True):
        unpack_blocks_reference(pool_LB2KPH, block_ids, heads, packed)


def land_blocks(
    pool_LB2KPH: Tensor,
    block_ids: Sequence[int],
    heads: range,
    packed: Tensor,
    num_tokens: Sequence[int],
    digests_NLK: Tensor,
) -> list[bool]:
    """`unpack_blocks` for those whose digests are these [N, L, heads], on the host; says which. Nothing wrong is
    written."""
    kernel = byte_kernel("land_blocks")
    num_layers, num_blocks, _, _, P, H = pool_LB2KPH.shape
    strides, size = pool_LB2KPH.stride(), pool_LB2KPH.itemsize
    if kernel is None or pool_LB2KPH.is_cuda or strides[3:] != (P * H, H, 1) or not packed.is_contiguous():
        return _land_in_two_steps(pool_LB2KPH, block_ids, heads, packed, num_tokens, digests_NLK)
    plane_bytes = P * H * size
    constants_2W = plane_constants(-(-plane_bytes // _WORD_BYTES))
    digests_NLK = digests_NLK.contiguous()
    assert packed.nbytes == len(block_ids) * num_layers * 2 * len(heads) * plane_bytes
    assert digests_NLK.shape == (len(block_ids), num_layers, len(heads))
    assert not block_ids or (min(block_ids) >= 0 and max(block_ids) < num_blocks)
    is_right = bytearray(len(block_ids))
    kernel(
        *(pool_LB2KPH.data_ptr() + heads.start * plane_bytes, as_longs(block_ids)),
        *(as_longs([count * H * size for count in num_tokens]), len(block_ids), num_layers, len(heads), plane_bytes),
        *(stride * size for stride in strides[:3]),
        *(packed.data_ptr(), constants_2W.ctypes.data, constants_2W.nbytes // 2, digests_NLK.data_ptr()),
        (ctypes.c_char * len(is_right)).from_buffer(is_right),
    )
    return [bool(flag) for flag in is_right]


def _land_in_two_steps(
    pool_LB2KPH: Tensor,
    block_ids: Sequence[int],
    heads: range,
    packed: Tensor,
    num_tokens: Sequence[int],
    digests_NLK: Tensor,
) -> list[bool]:
    blocks_LB2KPH = as_blocks(packed, pool_LB2KPH, len(heads)).transpose(0, 1)
    found_NLK = digest_blocks(blocks_LB2KPH, range(len(num_tokens)), num_tokens).cpu()
    is_right: list[bool] = (found_NLK == digests_NLK).flatten(1).all(1).tolist()
    right = [at for at, flag in enumerate(is_right) if flag]
    if right:
        if len(right) < len(is_right):
            packed = packed.view(len(is_right), -1)[right].flatten()
        unpack_blocks(pool_LB2KPH, [block_ids[at] for at in right], heads, packed)
    return is_right


def digest_blocks(pool_LB2KPH: Tensor, block_ids: Sequence[int], num_tokens: Sequence[int]) -> Tensor:
    """[N, L, K] int64 on the pool's device: `digest_block` of each of these blocks; any strided view will do."""
    assert len(block_ids) == len(num_tokens)
    H = pool_LB2KPH.shape[-1]
    if pool_LB2KPH.is_cuda and H * pool_LB2KPH.itemsize % _WORD_BYTES == 0:
        from tensorweave.kernels.blocks.triton import digest_runs

        return digest_runs(pool_LB2KPH, _ids(block_ids, pool_LB2KPH), _ids(num_tokens, pool_LB2KPH))
    digests_NLK = digest_blocks_native(pool_LB2KPH, block_ids, num_tokens)
    return digest_blocks_reference(pool_LB2KPH, block_ids, num_tokens) if digests_NLK is None else digests_NLK


def pack_blocks_reference(pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
    for packed, block_id in zip(as_blocks(out, pool_LB2KPH, len(heads)), block_ids, strict=True):
        packed.copy_(pool_LB2KPH[:, block_id, :, heads.start : heads.stop])


def unpack_blocks_reference(pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, packed: Tensor) -> None:
    for block, block_id in zip(as_blocks(packed, pool_LB2KPH, len(heads)), block_ids, strict=True):
        pool_LB2KPH[:, block_id, :, heads.start : heads.stop].copy_(block)


def digest_blocks_reference(pool_LB2KPH: Tensor, block_ids: Sequence[int], num_tokens: Sequence[int]) -> Tensor:
    num_layers, _, _, num_heads, _, _ = pool_LB2KPH.shape
    if not block_ids:
        return torch.empty((0, num_layers, num_heads), dtype=torch.int64, device=pool_LB2KPH.device)
    pairs = zip(block_ids, num_tokens, strict=True)
    return torch.stack([digest_block(pool_LB2KPH[:, block_id], count) for block_id, count in pairs])


def as_blocks(packed: Tensor, pool_LB2KPH: Tensor, num_heads: int) -> Tensor:
    """[N, L, 2, num_heads, P, H] view of packed bytes of blocks of this pool."""
    num_layers, _, _, _, P, H = pool_LB2KPH.shape
    return packed.view(pool_LB2KPH.dtype).view(-1, num_layers, 2, num_heads, P, H)


def _move_natively(
    pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, packed: Tensor, *, is_unpacking: bool
) -> bool:
    """By the C kernel; False, and nothing is moved, where it does not run or the pool's planes are not whole."""
    kernel = byte_kernel("move_blocks")
    num_layers, num_blocks, _, _, P, H = pool_LB2KPH.shape
    strides = pool_LB2KPH.stride()
    if kernel is None or pool_LB2KPH.is_cuda or strides[3:] != (P * H, H, 1) or not packed.is_contiguous():
        return False
    size = pool_LB2KPH.itemsize
    plane_bytes = P * H * size
    assert packed.nbytes == len(block_ids) * num_layers * 2 * len(heads) * plane_bytes
    assert not block_ids or (min(block_ids) >= 0 and max(block_ids) < num_blocks)
    kernel(
        *(pool_LB2KPH.data_ptr() + heads.start * plane_bytes, as_longs(block_ids), len(block_ids), num_layers),
        *(len(heads) * plane_bytes, *(stride * size for stride in strides[:3])),
        *(packed.data_ptr(), is_unpacking),
    )
    return True


def _is_worded(pool_LB2KPH: Tensor) -> bool:
    """Planes are whole words, one after another, so a head range's keys, or values, are one run of words."""
    P, H = pool_LB2KPH.shape[-2:]
    return P * H * pool_LB2KPH.itemsize % _WORD_BYTES == 0 and pool_LB2KPH.stride()[3:] == (P * H, H, 1)


def _ids(values: Sequence[int], pool: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=pool.device)
