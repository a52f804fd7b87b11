"""Decode attention against float64: lengths on every edge, grouped heads, windows, padded rows, splits; equal bits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tensorweave.kernels.attention.triton_decode import choose_splits, decode_attention
from tensorweave.kernels.weights import FP8
from tests.kernels.attention.decode_cases import (
    TOLERANCE,
    Case,
    make_case,
    poison_unused,
    reference,
    relative_error,
    run,
)

pytestmark = pytest.mark.gpu


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
    ours = run(decode_attention, case, N, splits, pdl)
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
    assert relative_error(run(decode_attention, case, N, splits, pdl), expected) < TOLERANCE[torch.bfloat16]
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
    assert relative_error(run(decode_attention, case, 8, splits, pdl), expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("num_rows", [3, 50])
def test_full_grid_repeats_its_bits(num_rows: int, device: torch.device, pdl: bool, gpu_only: None) -> None:
    """And a row has the same bits alone as in a batch, with as many splits."""
    lengths = torch.randint(1, 3000, (num_rows,)).tolist()
    case = make_case(lengths, 32, 8, 128, 32, torch.bfloat16, device, rotates=True)
    splits = 4
    expected, _ = reference(case, 32)
    first = run(decode_attention, case, 32, splits, pdl)
    assert relative_error(first, expected) < TOLERANCE[torch.bfloat16]
    for _ in range(100):
        assert torch.equal(run(decode_attention, case, 32, splits, pdl), first)
    for row in range(min(num_rows, 5)):
        alone = Case(case.heads_RXH[row : row + 1], case.cache_BCPH, case.table_RW[row : row + 1],
                         case.lengths_R[row : row + 1], case.rotation, None)  # fmt: skip
        assert torch.equal(run(decode_attention, alone, 32, splits, pdl)[0], first[row])


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
