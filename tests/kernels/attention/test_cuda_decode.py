"""Decode attention over an 8-bit cache by the kernel for Hopper against float64: lengths, windows, norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.attention.cuda_decode import decode_attention, fits
from tensorweave.kernels.weights import FP8
from tests.kernels.attention.decode_cases import TOLERANCE, Case, make_case, poison_unused, reference, relative_error
from tests.kernels.attention.decode_cases import run as run_form

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def attend(*tensors: Tensor, num_splits: int, **options: Any) -> None:
    """All but the workspace of splits."""
    decode_attention(*tensors[:-1], **options)


def run(case: Case, N: int) -> Tensor:
    assert fits(case.heads_RXH, case.cache_BCPH, N)
    return run_form(attend, case, N, 1, pdl=True)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("N", "K", "P"), [(4, 1, 32), (9, 3, 16), (14, 2, 8), (8, 8, 64), (8, 1, 128)], ids=str)
def test_equals_the_reference(N: int, K: int, P: int, dtype: torch.dtype, normed: bool, hopper: torch.device) -> None:
    lengths = [1, 2, P, P + 1, 0, 31, 32, 33, 34, 63, 64, 65, 257, 1000]
    case = make_case(lengths, N, K, 128, P, dtype, hopper, rotates=True, normed=normed, kv_dtype=FP8)
    poison_unused(case)
    expected, cache = reference(case, N)
    ours = run(case, N)
    assert relative_error(ours, expected) < TOLERANCE[BF16]
    assert not ours[4].any(), "a padded row is zero"
    stored = case.cache_BCPH.float()
    assert torch.equal(stored.isnan(), cache.isnan()), "nothing else was written"
    error = (stored.double() - cache.double()).nan_to_num(0.0).abs()
    assert (error <= 0.13 * cache.double().nan_to_num(0.0).abs() + 2**-9).all(), "at most a neighbouring number"


@pytest.mark.parametrize("window", [1, 31, 40, 64, 1000])
def test_window(window: int, hopper: torch.device) -> None:
    lengths = [1, 40, 41, 65, 130, 300]
    case = make_case(lengths, 8, 2, 128, 32, BF16, hopper, rotates=True, window=window, kv_dtype=FP8)
    poison_unused(case)
    expected, _ = reference(case, 8)
    assert relative_error(run(case, 8), expected) < TOLERANCE[BF16]


@pytest.mark.parametrize("num_rows", [3, 300])
def test_full_grid_repeats_its_bits(num_rows: int, hopper: torch.device) -> None:
    """And a row has the same bits alone as in a batch."""
    lengths = torch.randint(1, 1500, (num_rows,)).tolist()
    case = make_case(lengths, 32, 8, 128, 32, BF16, hopper, rotates=True, kv_dtype=FP8)
    first = run(case, 32)
    for _ in range(50):
        assert torch.equal(run(case, 32), first)
    for row in range(3):
        alone = Case(case.heads_RXH[row : row + 1], case.cache_BCPH, case.table_RW[row : row + 1],
                         case.lengths_R[row : row + 1], case.rotation, None)  # fmt: skip
        assert torch.equal(run(alone, 32)[0], first[row])
        assert relative_error(first[row : row + 1], reference(alone, 32)[0]) < TOLERANCE[BF16]


def test_what_it_is_not_for(hopper: torch.device) -> None:
    heads = torch.empty(2, 12, 128, dtype=BF16, device=hopper)
    cache = torch.empty(4, 4, 32, 128, device=hopper)
    assert fits(heads, cache.to(FP8), 8)
    assert not fits(heads, cache.bfloat16(), 8)
    assert not fits(heads, cache[..., :64].to(FP8), 8)
    assert not fits(heads, cache.to(FP8), 32), "more query heads than columns of the matrix unit"
    assert not fits(heads, cache[:, :, :2].to(FP8), 8)
    assert not fits(heads.float(), cache.to(FP8), 8)
