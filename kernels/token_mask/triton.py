"""`mask_tokens` of `kernels.token_mask.reference` on a GPU."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

# R rows of logits, N of them masked, V vocabulary, W = ⌈V / 32⌉ words of bits

_BLOCK: Final = 4096


@triton.jit(do_not_specialize=["V", "W", "row_stride"])
def _mask_tokens(logits_ptr, masks_ptr, rows_ptr, V, W, row_stride, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + n).to(tl.int64)
    word = tl.load(masks_ptr + n.to(tl.int64) * W + (token >> 5), mask=token < V, other=-1)
    is_banned = ((word >> (token & 31)) & 1) == 0
    banned = tl.full((BLOCK,), float("-inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * row_stride + token, banned, mask=is_banned & (token < V))


def mask_tokens(logits_RV: Tensor, masks_NW: Tensor, rows_N: Tensor) -> None:
    assert logits_RV.stride(1) == 1
    assert masks_NW.is_contiguous()
    V, W = logits_RV.shape[1], masks_NW.shape[1]
    _mask_tokens[(len(rows_N), triton.cdiv(V, _BLOCK))](
        logits_RV, masks_NW, rows_N, V, W, logits_RV.stride(0), BLOCK=_BLOCK, num_warps=8
    )
