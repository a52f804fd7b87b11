"""Decode attention against float64: lengths on every edge, grouped heads, windows, padded rows, splits; equal bits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.attention.triton_decode import (
    DecodeWorkspace,
    HeadRotation,
    choose_splits,
    decode_attention,
)
from tensorweave.kernels.linear.triton_quantize import make_peaks
from tensorweave.kernels.weights import FP8

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}  # relative error of the whole result in the Frobenius norm
EPSILON = 1e-6


@dataclass
class Case:
    heads_RXH: Tensor
    cache_BCPH: Tensor
    table_RW: Tensor
    lengths_R: Tensor
    rotation: HeadRotation | None
    window: int | None

    @property
    def scale(self) -> float:
        return self.cache_BCPH.shape[-1] ** -0.5


def make_case(
    lengths: list[int], N: int, K: int, H: int, P: int, dtype: torch.dtype, device: torch.device,
    *, rotates: bool, normed: bool = False, window: int | None = None, kv_dtype: torch.dtype | None = None,
) -> Case:  # fmt: skip
    R, W = len(lengths), -(-max(lengths) // P) + 2
    cache = torch.randn(R * W + 1, 2 * K, P, H, device=device).to(kv_dtype or dtype)
    table = torch.randperm(R * W, device=device)[: R * W].view(R, W).int() + 1
    rotation = None
    if rotates:
        angles = torch.rand(max(lengths) + 1, H // 2, device=device) * 6
        gains = [torch.rand(H, device=device).add(0.5).to(dtype) if normed else None for _ in range(2)]
        rotation = HeadRotation(torch.cat([angles.cos(), angles.sin()], -1), *gains, EPSILON)
    heads = torch.randn(R, N + 2 * K if rotates else N, H, device=device).to(dtype)
    return Case(heads, cache, table, torch.tensor(lengths, dtype=torch.int32, device=device), rotation, window)


def poison_unused(case: Case) -> None:
    """NaN in every slot that no row may read: past its length, and before its window by a block or more."""
    P = case.cache_BCPH.shape[2]
    used = torch.zeros(case.cache_BCPH.shape[0], P, dtype=torch.bool)
    for row, length in enumerate(case.lengths_R.tolist()):
        first = 0 if case.window is None else max(0, length - case.window)
        last = length - 1 if case.rotation is not None else length
        for at in range(first, last):
            used[case.table_RW[row, at // P], at % P] = True
    unused = ~used[:, None, :, None].to(case.cache_BCPH.device)
    if case.cache_BCPH.dtype == FP8:
        case.cache_BCPH.view(torch.uint8).masked_fill_(unused, 0x7F)
    else:
        case.cache_BCPH.masked_fill_(unused, float("nan"))


def rotated(x: Tensor, gain: Tensor | None, angles: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 heads [.., H] normed and rotated, rounded as the cache holds them."""
    wide = x.double()
    if gain is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt() * gain.double()
    left, right = wide.chunk(2, -1)
    cos, sin = angles.double().chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(dtype)


def reference(case: Case, N: int) -> tuple[Tensor, Tensor]:
    """The result in float64, and what the cache must hold afterwards."""
    dtype = case.cache_BCPH.dtype
    cache = case.cache_BCPH.float() if dtype == FP8 else case.cache_BCPH.clone()
    _, C, P, H = cache.shape
    K = C // 2
    result = torch.zeros(len(case.heads_RXH), N, H, dtype=torch.float64, device=cache.device)
    for row, length in enumerate(case.lengths_R.tolist()):
        if not length:
            continue
        blocks, heads = case.table_RW[row].long(), case.heads_RXH[row]
        q = heads[:N]
        if case.rotation is not None:
            angles = case.rotation.table_LH[length - 1]
            q = rotated(q, case.rotation.query_norm_H, angles, q.dtype)
            key = rotated(heads[N : N + K], case.rotation.key_norm_H, angles, dtype).to(cache.dtype)
            place = blocks[(length - 1) // P], (length - 1) % P
            cache[place[0], :K, place[1]] = key
            cache[place[0], K:, place[1]] = heads[N + K :].to(dtype).to(cache.dtype)
        first = 0 if case.window is None else max(0, length - case.window)
        kept = cache[blocks].transpose(0, 1).reshape(C, -1, H)[:, first:length].double()
        scores = torch.einsum("kgh,klh->kgl", q.double().view(K, N // K, H), kept[:K]) * case.scale
        result[row] = torch.einsum("kgl,klh->kgh", scores.softmax(-1), kept[K:]).reshape(N, H)
    return result, cache


def run(case: Case, N: int, splits: int, pdl: bool) -> Tensor:
    R, H, K = len(case.heads_RXH), case.heads_RXH.shape[-1], case.cache_BCPH.shape[1] // 2
    workspace = DecodeWorkspace.create(R, N, K, H, splits, case.heads_RXH.device)
    workspace.parts.fill_(float("nan"))
    workspace.stats.fill_(float("nan"))
    out = torch.full((R, N, H), float("nan"), dtype=case.heads_RXH.dtype, device=case.heads_RXH.device)
    peaks = make_peaks(R, device=case.heads_RXH.device)
    decode_attention(
        case.heads_RXH, case.cache_BCPH, case.table_RW, case.lengths_R, out, workspace,
        scale=case.scale, num_splits=splits, rotation=case.rotation, window=case.window, peaks_RA=peaks, pdl=pdl,
    )  # fmt: skip
    assert not workspace.arrived.any(), "counters must be zero again"
    assert torch.equal(peaks.view(torch.float32).amax(1), out.float().abs().amax((1, 2)))
    return out


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "H", "P"), [(4, 1, 128, 32), (9, 3, 64, 16), (4, 4, 32, 64), (20, 1, 64, 128)], ids=str
)
def test_equals_the_reference(
    N: int, K: int, H: int, P: int, rotates: bool, splits: int, dtype: torch.dtype, device: torch.device, pdl: bool
) -> None:
    case = make_case([1, 2, P, P + 1, 0, 257], N, K, H, P, dtype, device, rotates=rotates)
    poison_unused(case)
    expected, cache = reference(case, N)
    ours = run(case, N, splits, pdl)
    assert relative_error(ours, expected) < TOLERANCE[dtype]
    assert not ours[4].any(), "a padded row is zero"
    error = (case.cache_BCPH.double() - cache.double()).nan_to_num(0.0)
    assert error.abs().max() <= (0.05 if dtype == torch.bfloat16 else 1e-5), "the new key and value are in their slots"
    assert torch.equal(case.cache_BCPH.isnan(), cache.isnan()), "and nothing else was written"


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize(("N", "K", "H", "P"), [(32, 8, 128, 32), (9, 3, 64, 16)], ids=str)
def test_an_8_bit_cache(
    N: int, K: int, H: int, P: int, rotates: bool, splits: int, device: torch.device, pdl: bool, gpu_only: None
) -> None:
    lengths = [1, 2, P, P + 1, 0, 257, 1000]
    case = make_case(lengths, N, K, H, P, torch.bfloat16, device, rotates=rotates, kv_dtype=FP8)
    poison_unused(case)
    expected, cache = reference(case, N)
    assert relative_error(run(case, N, splits, pdl), expected) < TOLERANCE[torch.bfloat16]
    stored = case.cache_BCPH.float()
    assert torch.equal(stored.isnan(), cache.isnan()), "nothing else was written"
    error = (stored.double() - cache.double()).nan_to_num(0.0).abs()
    assert (error <= 0.13 * cache.double().nan_to_num(0.0).abs() + 2**-9).all(), "at most a neighbouring number"


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("window", [1, 40, 64, 1000])
def test_window_and_head_norms(window: int, splits: int, device: torch.device, pdl: bool) -> None:
    case = make_case(
        [1, 40, 41, 65, 130, 300], 8, 2, 64, 32, torch.bfloat16, device, rotates=True, normed=True, window=window
    )
    poison_unused(case)
    expected, _ = reference(case, 8)
    assert relative_error(run(case, 8, splits, pdl), expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("num_rows", [3, 50])
def test_full_grid_repeats_its_bits(num_rows: int, device: torch.device, pdl: bool, gpu_only: None) -> None:
    """And a row has the same bits alone as in a batch, with as many splits."""
    lengths = torch.randint(1, 3000, (num_rows,)).tolist()
    case = make_case(lengths, 32, 8, 128, 32, torch.bfloat16, device, rotates=True)
    splits = 4
    expected, _ = reference(case, 32)
    first = run(case, 32, splits, pdl)
    assert relative_error(first, expected) < TOLERANCE[torch.bfloat16]
    for _ in range(100):
        assert torch.equal(run(case, 32, splits, pdl), first)
    for row in range(min(num_rows, 5)):
        alone = Case(case.heads_RXH[row : row + 1], case.cache_BCPH, case.table_RW[row : row + 1],
                         case.lengths_R[row : row + 1], case.rotation, None)  # fmt: skip
        assert torch.equal(run(alone, 32, splits, pdl)[0], first[row])


@pytest.mark.parametrize(
    ("rows", "longest", "splits"),
    [
        (1, 100, 1),
        (1, 8192, 32),
        (2, 1024, 8),
        (8, 1024, 8),
        (16, 1024, 8),
        (32, 1024, 1),
        (64, 1024, 2),
        (256, 8192, 1),
    ],
)
def test_number_of_splits(rows: int, longest: int, splits: int) -> None:
    assert choose_splits(rows, 8, longest) == splits
    assert choose_splits(rows, 8, longest, rows * longest) >= splits


def test_a_long_row_among_short_ones_is_split_more() -> None:
    assert choose_splits(64, 8, 16384, 16384 + 63 * 200) == 8
