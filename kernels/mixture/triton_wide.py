"""The experts' products of many rows each: tiles of rows of one expert, found from where its pairs begin."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

# E experts, S chosen experts of a token, D hidden size, I intermediate width; blocks of BM pairs, BN rows of the
# weight, BK inputs


@triton.jit
def _find_tile(starts_ptr, number, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """(expert, first pair, last pair) of a tile of rows; no pairs if there are fewer tiles."""
    e = tl.arange(0, EP)
    starts = tl.load(starts_ptr + e, mask=e < E, other=0)
    counts = tl.load(starts_ptr + e + 1, mask=e < E, other=0) - starts
    tiles = (counts + BM - 1) // BM
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum(((ends <= number) & (e < E)).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    is_tile = expert < E
    expert = tl.minimum(expert, E - 1)
    first = tl.load(starts_ptr + expert) + (number - before) * BM
    last = tl.where(is_tile, tl.load(starts_ptr + expert + 1), first)
    return expert, first, last


@triton.jit
def gated_wide(
    x_ptr, w_desc, out_ptr, order_ptr, starts_ptr,
    D: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Neighbouring rows of the weight are a gate and its up."""
    columns: tl.constexpr = (2 * WIDTH + BN - 1) // BN
    e, first, last = _find_tile(starts_ptr, tl.program_id(0) // columns, E, EP, BM)
    if first >= last:
        return
    column = tl.program_id(0) % columns
    m = first + tl.arange(0, BM)
    k = tl.arange(0, BK)
    token = tl.load(order_ptr + m, mask=m < last, other=0) // S
    rows = x_ptr + token.to(tl.int64)[:, None] * D + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, D, BK, num_stages=STAGES):
        x = tl.load(rows + start) if D % BK == 0 else tl.load(rows + start, mask=(start + k < D)[None, :], other=0.0)
        acc = tl.dot(x, w_desc.load([e * 2 * WIDTH + column * BN, start]).T, acc)
    gate, up = tl.split(acc.reshape(BM, BN // 2, 2))  # neighbours, in one thread: no exchange
    n = column * (BN // 2) + tl.arange(0, BN // 2)
    result = (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    at = m[:, None].to(tl.int64) * WIDTH + n[None, :]
    tl.store(out_ptr + at, result, mask=(m < last)[:, None] & (n < WIDTH)[None, :])


@triton.jit
def down_wide(
    x_ptr, w_desc, out_ptr, order_ptr, starts_ptr,
    D: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (D + BN - 1) // BN
    e, first, last = _find_tile(starts_ptr, tl.program_id(0) // columns, E, EP, BM)
    if first >= last:
        return
    column = tl.program_id(0) % columns
    m = first + tl.arange(0, BM)
    k = tl.arange(0, BK)
    pair = tl.load(order_ptr + m, mask=m < last, other=0)
    rows = x_ptr + m.to(tl.int64)[:, None] * WIDTH + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, WIDTH, BK, num_stages=STAGES):
        x = tl.load(rows + start, mask=(m < last)[:, None] & (start + k < WIDTH)[None, :], other=0.0)
        acc = tl.dot(x, w_desc.load([e * D + column * BN, start]).T, acc)
    n = column * BN + tl.arange(0, BN)
    at = pair[:, None].to(tl.int64) * D + n[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(m < last)[:, None] & (n < D)[None, :])
