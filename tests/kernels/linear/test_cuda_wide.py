"""Gated products of many rows by the kernel for Hopper against float64; equal bits at full size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.linear.cuda_wide import WideTiling, choose_wide_tiling, wide_gated_linear

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 5e-4}
TILINGS = [WideTiling(224, 2), WideTiling(224, 1), WideTiling(256, 1), WideTiling(192, 3), WideTiling(128, 2)]
SHAPES = [(1, 256, 128), (129, 1520, 200), (300, 1040, 1000), (777, 768, 512)]


def error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected).norm() / expected.norm()).item()


class Case:
    """x, a weight whose rows alternate gate and up, and what must come out in float64."""

    def __init__(self, M: int, N: int, K: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.x = torch.randn(M, K, device=device).to(dtype)
        self.weight = (torch.randn(N, K, device=device) * K**-0.5).to(dtype)
        product = self.x.double() @ self.weight.double().T
        self.expected = F.silu(product[:, 0::2]) * product[:, 1::2]

    def run(self, tiling: WideTiling, rows: slice = slice(None)) -> Tensor:
        x = self.x[rows].contiguous()
        out = torch.full((len(x), len(self.weight) // 2), float("nan"), dtype=x.dtype, device=x.device)
        wide_gated_linear(x, self.weight, out, tiling, pdl=True)
        return out


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_equals_the_reference(M: int, N: int, K: int, tiling: WideTiling, hopper: torch.device) -> None:
    case = Case(M, N, K, hopper)
    assert error(case.run(tiling), case.expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_half_precision(hopper: torch.device) -> None:
    case = Case(200, 1040, 520, hopper, torch.float16)
    assert error(case.run(TILINGS[0]), case.expected) < TOLERANCE[torch.float16]


@pytest.mark.gpu
def test_a_row_has_the_same_bits_in_any_batch_and_tiling(hopper: torch.device) -> None:
    case = Case(500, 4096, 1024, hopper)
    whole = case.run(WideTiling(224, 2))
    assert torch.equal(whole, case.run(WideTiling(192, 3)))
    assert torch.equal(case.run(WideTiling(224, 1), slice(200, 330)), whole[200:330])


@pytest.mark.gpu
def test_full_size_repeats_its_bits(hopper: torch.device) -> None:
    case = Case(256, 28672, 4096, hopper)
    first = case.run(WideTiling(224, 2))
    assert error(first, case.expected) < TOLERANCE[torch.bfloat16]
    for _ in range(50):
        assert torch.equal(case.run(WideTiling(224, 2)), first)


@pytest.mark.gpu
def test_a_tiling_that_no_box_of_rows_fits(hopper: torch.device) -> None:
    with pytest.raises(AssertionError, match="no box"):
        Case(200, 1040, 520, hopper).run(WideTiling(144, 2))


@pytest.mark.parametrize("rows", [193, 256, 384, 448, 512, 640, 768, 1024])
def test_chosen_tilings_are_possible(rows: int) -> None:
    tiling = choose_wide_tiling(rows)
    assert tiling is not None
    assert tiling.block_n % (16 * tiling.cluster_m) == 0
    assert tiling.num_stages >= 3


@pytest.mark.parametrize("rows", [1, 128, 136, 192, 257, 320, 400, 513, 700, 1025, 8192])
def test_other_numbers_of_rows_are_for_cublas(rows: int) -> None:
    assert choose_wide_tiling(rows) is None
