"""The last step of a product of few rows whose adapters add to it: see `kernels.lora.update`."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

# M rows, N outputs, P parts of them, L places, R most rank; blocks of BM rows, BN outputs, BE of the L R columns of B


@triton.jit
def _spread(low_ptr, places, m, e, part, P: tl.constexpr, R: tl.constexpr):
    """[rows, columns e of B]: a row's numbers at its own adapter's columns, zeros at others."""
    at = (m.to(tl.int64) * P + part)[:, None] * R + (e % R)[None, :]
    return tl.load(low_ptr + at, mask=(e // R)[None, :] == places[:, None], other=0.0)


@triton.jit
def add_low_rank(
    acc, up, m, tile, M, b_desc, low_ptr, places_ptr, LR: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """acc and up are [outputs of the tile, rows m]. Columns of B are read if a row has an adapter there."""
    places = tl.load(places_ptr + m, mask=m < M, other=-1)
    part = 0 if GATED else (tile * BN >= FIRST).to(tl.int32) + (tile * BN >= SECOND).to(tl.int32)
    for begin in tl.range(0, LR, BE, num_stages=1):
        is_here = (places >= 0) & (places * R + R > begin) & (places * R < begin + BE)
        if tl.max(is_here.to(tl.int32), 0) > 0:
            e = begin + tl.arange(0, BE)
            low = _spread(low_ptr, places, m, e, part, P, R).T
            acc = tl.dot(b_desc.load([tile * BN, begin]), low, acc)
            if GATED:  # a row of the descriptor is a gate row and its up row, end to end
                if P > 1:
                    low = _spread(low_ptr, places, m, e, P - 1, P, R).T
                up = tl.dot(b_desc.load([tile * BN, LR + begin]), low, up)
    return acc, up
