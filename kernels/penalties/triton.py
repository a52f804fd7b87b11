"""`penalise` and `count` of `kernels.penalties.reference` on a GPU."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensorweave.kernels.penalties.reference import MOST, PenalisedRows

# R rows of logits, N of them penalised, C rows of counts, V vocabulary

_BLOCK: Final = 4096
_MOST = tl.constexpr(MOST)


@triton.jit(do_not_specialize=["V", "row_stride"])
def _penalise(
    logits_ptr, counts_ptr, rows_ptr, places_ptr, repetition_ptr, presence_ptr, frequency_ptr, V, row_stride, greatest,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, place = tl.load(rows_ptr + n).to(tl.int64), tl.load(places_ptr + n).to(tl.int64)
    repetition = tl.load(repetition_ptr + n)
    presence, frequency = tl.load(presence_ptr + n), tl.load(frequency_ptr + n)
    counts = tl.load(counts_ptr + place * V + token, mask=token < V, other=0).to(tl.int32)
    logits_ptr += row * row_stride
    old = tl.load(logits_ptr + token, mask=counts > 0, other=0.0).to(tl.float32)
    new = tl.where(old > 0, old / repetition, old * repetition)
    output = (counts >> 1).to(tl.float32)
    new = new - tl.where(output > 0, presence, 0.0) - frequency * output
    new = tl.where(new > greatest, greatest, new)
    tl.store(logits_ptr + token, new.to(logits_ptr.dtype.element_ty), mask=counts > 0)


@triton.jit(do_not_specialize=["V"])
def _count(tokens_ptr, counts_ptr, rows_ptr, places_ptr, V):
    n = tl.program_id(0)
    token = tl.maximum(tl.load(tokens_ptr + tl.load(rows_ptr + n)), 0)
    counts_ptr += tl.load(places_ptr + n).to(tl.int64) * V + token
    counts = tl.load(counts_ptr).to(tl.int32)
    tl.store(counts_ptr, tl.minimum(counts + 2, _MOST).to(tl.int16))


def penalise(logits_RV: Tensor, counts_CV: Tensor, rows: PenalisedRows) -> None:
    assert logits_RV.stride(1) == 1
    assert counts_CV.is_contiguous()
    V = logits_RV.shape[1]
    _penalise[(len(rows.rows_N), triton.cdiv(V, _BLOCK))](
        logits_RV, counts_CV, rows.rows_N, rows.counts_N, rows.repetition_N, rows.presence_N, rows.frequency_N, V,
        logits_RV.stride(0), torch.finfo(logits_RV.dtype).max, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def count(tokens_R: Tensor, counts_CV: Tensor, rows: PenalisedRows) -> None:
    assert counts_CV.is_contiguous()
    _count[(len(rows.rows_N),)](tokens_R, counts_CV, rows.rows_N, rows.counts_N, counts_CV.shape[1], num_warps=1)
