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
    acc, up, places, m, n, tile, b_ptr, low_ptr, N: tl.constexpr, LR: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """acc and up are [outputs n of the tile, rows m]. Columns of B are read if a row has an adapter there. By ordinary
    loads: those of B and of `low` are on their way together, which the copy engine's would not be."""
    part = 0 if GATED else (tile * BN >= FIRST).to(tl.int32) + (tile * BN >= SECOND).to(tl.int32)
    width: tl.constexpr = 2 * LR if GATED else LR
    for begin in tl.range(0, LR, BE, num_stages=1):
        is_here = (places >= 0) & (places * R + R > begin) & (places * R < begin + BE)
        if tl.max(is_here.to(tl.int32), 0) > 0:
            e = begin + tl.arange(0, BE)
            at = b_ptr + n.to(tl.int64)[:, None] * width + e[None, :]
            mask = (n < N)[:, None] & (e < LR)[None, :]
            b = tl.load(at, mask=mask, other=0.0)
            low = _spread(low_ptr, places, m, e, part, P, R)
            if GATED:  # rows of B alternate gate and up
                b_up = tl.load(at + LR, mask=mask, other=0.0)
                low_up = low
                if P > 1:
                    low_up = _spread(low_ptr, places, m, e, P - 1, P, R)
                up = tl.dot(b_up, low_up.T, up)
            acc = tl.dot(b, low.T, acc)
    return acc, up
