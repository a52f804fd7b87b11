"""KV blocks moved and digested by the native kernels, in host memory. Each plane of a pool must be contiguous."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensorweave.kernels.blocks.digest import plane_constants
from tensorweave.kernels.blocks.reference import Numbers, as_ints
from tensorweave.kernels.native.library import as_longs, byte_kernel

# L layers, B blocks of the pool, K KV heads of this rank, P tokens per block, H head dim, N blocks chosen

_WORD_BYTES = 8


class NativeBlocks:
    def __init__(self, digest: Any, move: Any, unpack_verified: Any) -> None:
        self._digest = digest
        self._move = move
        self._unpack_verified = unpack_verified

    def pack(self, pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
        self._copy(pool_LB2KPH, block_ids, heads, out, is_unpacking=False)

    def unpack(self, pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, packed: Tensor) -> None:
        self._copy(pool_LB2KPH, block_ids, heads, packed, is_unpacking=True)

    def digest(self, pool_LB2KPH: Tensor, block_ids: Numbers, num_tokens: Numbers) -> Tensor:
        num_layers, _, two, num_heads, P, H = pool_LB2KPH.shape
        strides, size = pool_LB2KPH.stride(), pool_LB2KPH.itemsize
        assert two == 2
        assert len(block_ids) == len(num_tokens)
        assert strides[4:] == (H, 1)
        constants_2W = plane_constants(-(-P * H * size // _WORD_BYTES))
        digests_NLK = torch.empty((len(block_ids), num_layers, num_heads), dtype=torch.int64)
        bytes_N = [count * H * size for count in as_ints(num_tokens)]
        self._digest(
            *(
                pool_LB2KPH.data_ptr(),
                as_longs(as_ints(block_ids)),
                as_longs(bytes_N),
                len(bytes_N),
                num_layers,
                num_heads,
            ),
            *(stride * size for stride in strides[:4]),
            *(constants_2W.ctypes.data, constants_2W.nbytes // 2, digests_NLK.data_ptr()),
        )
        return digests_NLK

    def unpack_verified(
        self,
        pool_LB2KPH: Tensor,
        block_ids: Sequence[int],
        heads: range,
        packed: Tensor,
        num_tokens: Sequence[int],
        digests_NLK: Tensor,
    ) -> list[bool]:
        num_layers, _, _, _, P, H = pool_LB2KPH.shape
        size = pool_LB2KPH.itemsize
        plane_bytes = P * H * size
        constants_2W = plane_constants(-(-plane_bytes // _WORD_BYTES))
        digests_NLK = digests_NLK.contiguous()
        _check(pool_LB2KPH, block_ids, heads, packed)
        assert digests_NLK.shape == (len(block_ids), num_layers, len(heads))
        is_right = bytearray(len(block_ids))
        self._unpack_verified(
            *(pool_LB2KPH.data_ptr() + heads.start * plane_bytes, as_longs(block_ids)),
            *(as_longs([count * H * size for count in num_tokens]), len(block_ids), num_layers, len(heads)),
            *(plane_bytes, *(stride * size for stride in pool_LB2KPH.stride()[:3])),
            *(packed.data_ptr(), constants_2W.ctypes.data, constants_2W.nbytes // 2, digests_NLK.data_ptr()),
            (ctypes.c_char * len(is_right)).from_buffer(is_right),
        )
        return [bool(flag) for flag in is_right]

    def _copy(
        self, pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, packed: Tensor, *, is_unpacking: bool
    ) -> None:
        num_layers, _, _, _, P, H = pool_LB2KPH.shape
        size = pool_LB2KPH.itemsize
        plane_bytes = P * H * size
        _check(pool_LB2KPH, block_ids, heads, packed)
        self._move(
            *(pool_LB2KPH.data_ptr() + heads.start * plane_bytes, as_longs(block_ids), len(block_ids), num_layers),
            *(len(heads) * plane_bytes, *(stride * size for stride in pool_LB2KPH.stride()[:3])),
            *(packed.data_ptr(), is_unpacking),
        )


def native_blocks() -> NativeBlocks | None:
    """None where there are no native kernels."""
    digest, move, unpack = (byte_kernel(name) for name in ("digest_blocks", "move_blocks", "unpack_verified_blocks"))
    return None if digest is None else NativeBlocks(digest, move, unpack)


def _check(pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, packed: Tensor) -> None:
    """The kernels check nothing: a wrong id would write anywhere."""
    num_layers, num_blocks, _, _, P, H = pool_LB2KPH.shape
    assert pool_LB2KPH.stride()[3:] == (P * H, H, 1)
    assert packed.is_contiguous()
    assert packed.nbytes == len(block_ids) * num_layers * 2 * len(heads) * P * H * pool_LB2KPH.itemsize
    assert not block_ids or (min(block_ids) >= 0 and max(block_ids) < num_blocks)
