"""Products of few rows with what adapters add, against float64: each epilogue, parts of the outputs, ranks, rows alone
and together. In bfloat16 on a Hopper GPU; the Triton form in float16 where kernels are interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.linear.thin_tiling import FEW_TILING, GATED, PLAIN, RESIDUAL, Tiling, choose_tiling
from tensorweave.kernels.linear.triton_thin import ResidualSum, SplitWorkspace, thin_linear
from tensorweave.kernels.lora.cuda_shrink import ShrinkWorkspace, shrink
from tensorweave.kernels.lora.stack import SiteStack
from tensorweave.kernels.lora.update import LowRankUpdate, can_update
from tests.kernels.conftest import IS_INTERPRETED

pytestmark = pytest.mark.gpu

EPSILON = 1e-5
DTYPE = torch.float16 if IS_INTERPRETED else torch.bfloat16
TOLERANCE = 6e-3
# epilogue, outputs of the weight, inputs, where its parts begin
SITES = [(PLAIN, 320, 640, (128, 192)), (RESIDUAL, 192, 1088, ()), (GATED, 256, 1024, (128,)), (GATED, 256, 576, ())]
PLACES = [(3, 16), (8, 16), (5, 64), (3, 256)]  # places, most rank


def make_stack(
    N: int, K: int, L: int, R: int, bounds: tuple[int, ...], is_gated: bool, device: torch.device
) -> SiteStack:
    """Zeros beyond an adapter's rank, as its readers may expect."""
    a = torch.randn(len(bounds) + 1, L, R, K, device=device).div(K**0.5)
    b = torch.randn(N, L, R, device=device).div(R**0.5)
    ranks = torch.randint(1, R + 1, (L,), dtype=torch.int32, device=device)
    for place, rank in enumerate(ranks.tolist()):
        a[:, place, rank:], b[:, place, rank:] = 0, 0
    return SiteStack(a.to(DTYPE), b.to(DTYPE), ranks, bounds, is_gated)


def make_places(M: int, L: int, device: torch.device) -> Tensor:
    """Some rows without an adapter, and an adapter that no row has."""
    places = torch.randint(-1, L, (M,), dtype=torch.int32, device=device)
    return torch.where(places == L // 2, -1, places)


def exact_low(x: Tensor, places: Tensor, stack: SiteStack) -> Tensor:
    low = torch.zeros(len(x), stack.num_parts, stack.max_rank, dtype=torch.float64, device=x.device)
    for row, place in enumerate(places.tolist()):
        if place >= 0:
            low[row] = stack.a_PLRK[:, place].double() @ x[row].double()
    return low


def exact(x: Tensor, weight: Tensor, low: Tensor, places: Tensor, stack: SiteStack) -> Tensor:
    out, part_N = x.double() @ weight.double().T, stack.part_of_outputs()
    for row, place in enumerate(places.tolist()):
        if place >= 0:
            out[row] += (stack.b_NLR[:, place].double() * low[row].double()[part_N]).sum(1)
    return out


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected).norm() / expected.norm()).item()


class Site:
    """A product with what its adapters add, and what it must be."""

    def __init__(
        self,
        M: int,
        epilogue: int,
        N: int,
        K: int,
        stack: SiteStack,
        device: torch.device,
        tiling: Tiling | None = None,
    ) -> None:
        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(DTYPE)

        self.epilogue, self.stack, self.places = epilogue, stack, make_places(M, len(stack.ranks_L), device)
        self.x, self.weight, self.gain = numbers(M, K), numbers(N, K).div(K**0.5), numbers(N)
        self.before, self.squares = numbers(M, N), torch.rand(M, 4, device=device) * K
        self.outputs = N // 2 if epilogue == GATED else N
        self.workspace = SplitWorkspace.create(N, M, 2, device)
        self.shrinking = ShrinkWorkspace.create([stack], M)
        for garbage in (self.shrinking.low, self.shrinking.parts):
            garbage.fill_(float("nan"))
        self.tiling = tiling or (
            FEW_TILING if M <= 16 and not IS_INTERPRETED else choose_tiling(max(M, 17), self.outputs, K, epilogue)
        )

    def make_out(self) -> Tensor | ResidualSum:
        M, device = len(self.x), self.x.device
        if self.epilogue != RESIDUAL:
            return torch.full((M, self.outputs), float("nan"), dtype=DTYPE, device=device)
        squares = torch.full((M, self.tiling.num_squares(self.outputs)), float("nan"), device=device)
        return ResidualSum(self.before.clone(), self.gain, torch.full_like(self.before, float("nan")), squares)

    def run(
        self, update: LowRankUpdate | None, *, pdl: bool, out: Tensor | ResidualSum | None = None
    ) -> Tensor | ResidualSum:
        out = self.make_out() if out is None else out
        thin_linear(
            self.x, self.weight, out, is_gated=self.epilogue == GATED, update=update,
            squares_MQ=None if self.epilogue == RESIDUAL else self.squares, epsilon=EPSILON, tiling=self.tiling,
            workspace=self.workspace, pdl=pdl,
        )  # fmt: skip
        return out

    def check(self, out: Tensor | ResidualSum, low: Tensor) -> None:
        expected = exact(self.x, self.weight, low, self.places, self.stack)
        if isinstance(out, ResidualSum):
            assert relative_error(out.residual_MN, self.before.double() + expected) < TOLERANCE
            assert relative_error(out.gained_MN, out.residual_MN.double() * self.gain.double()) < TOLERANCE
            sums = out.residual_MN.double().square().sum(1)
            torch.testing.assert_close(out.squares_MQ.double().sum(1), sums, atol=0, rtol=1e-4)
            return
        expected *= (self.squares.double().sum(1, keepdim=True) / self.x.shape[1] + EPSILON).rsqrt()
        if self.epilogue == GATED:
            gate, up = expected[:, 0::2], expected[:, 1::2]
            expected = gate * gate.sigmoid() * up
        assert relative_error(out, expected) < TOLERANCE


def rows_of(out: Tensor | ResidualSum) -> Tensor:
    return out if isinstance(out, Tensor) else out.residual_MN


@pytest.mark.parametrize(("L", "R"), PLACES)
@pytest.mark.parametrize(("epilogue", "N", "K", "bounds"), SITES)
@pytest.mark.parametrize("M", [1, 7, 16, 23, 64, 100])
def test_a_given_low_rank_result(
    M: int, epilogue: int, N: int, K: int, bounds: tuple[int, ...], L: int, R: int, device: torch.device, pdl: bool
) -> None:
    if not IS_INTERPRETED and M <= 16 and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs a Hopper GPU")
    stack = make_stack(N, K, L, R, bounds, epilogue == GATED, device)
    assert can_update(stack)
    site = Site(M, epilogue, N, K, stack, device)
    low = exact_low(site.x, site.places, stack).to(DTYPE)
    low[site.places < 0] = float("nan")  # not read
    update = LowRankUpdate(low, site.places, stack)
    site.check(out := site.run(update, pdl=pdl), low)
    alone = site.run(None, pdl=pdl)
    without = site.places < 0
    assert torch.equal(rows_of(out)[without], rows_of(alone)[without])


@pytest.mark.parametrize(("L", "R"), PLACES)
@pytest.mark.parametrize(("epilogue", "N", "K", "bounds"), SITES)
@pytest.mark.parametrize("M", [1, 16, 64, 128])
def test_shrink(
    M: int, epilogue: int, N: int, K: int, bounds: tuple[int, ...], L: int, R: int, hopper: torch.device, pdl: bool
) -> None:
    site = Site(M, epilogue, N, K, make_stack(N, K, L, R, bounds, epilogue == GATED, hopper), hopper)
    for _ in range(2):
        low = shrink(site.x, site.places, site.stack, site.shrinking, pdl=pdl)
        has, expected = site.places >= 0, exact_low(site.x, site.places, site.stack)
        if has.any():
            assert relative_error(low[has], expected[has]) < TOLERANCE
        assert low[~has].isnan().all()
        assert not site.shrinking.arrived.any()


@pytest.mark.parametrize("reads_early", [False, True])
@pytest.mark.parametrize(
    ("epilogue", "N", "K", "bounds"), [(PLAIN, 6144, 4096, (4096, 5120)), (RESIDUAL, 4096, 14336, ())]
)
@pytest.mark.parametrize("M", [16, 64])
def test_behind_the_kernel_that_makes_x(
    M: int, epilogue: int, N: int, K: int, bounds: tuple[int, ...], reads_early: bool, hopper: torch.device
) -> None:
    """Full grids in a graph, x made anew by a product before each: the products must not see the x before."""
    stack = make_stack(N, K, 8, 16, bounds, False, hopper)
    site = Site(M, epilogue, N, K, stack, hopper)
    makers = [torch.randn(K, 256, device=hopper).to(DTYPE) for _ in range(8)]
    seed, outs = torch.randn(M, 256, device=hopper).to(DTYPE), [site.make_out() for _ in makers]

    def steps() -> None:
        for out in outs:
            rows_of(out).copy_(site.before if epilogue == RESIDUAL else torch.zeros_like(rows_of(out)))
        for maker, out in zip(makers, outs, strict=True):
            thin_linear(seed, maker, site.x, tiling=choose_tiling(M, K, 256, PLAIN, has_few=True), pdl=True)
            low = shrink(site.x, site.places, stack, site.shrinking, pdl=True)
            site.run(LowRankUpdate(low, site.places, stack, reads_early=reads_early), pdl=True, out=out)

    steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for maker, out in zip(makers, outs, strict=True):
        thin_linear(seed, maker, site.x, tiling=choose_tiling(M, K, 256, PLAIN, has_few=True))
        torch.cuda.synchronize()
        low = shrink(site.x, site.places, stack, site.shrinking)
        torch.cuda.synchronize()
        again = site.run(LowRankUpdate(low, site.places, stack), pdl=False)
        assert torch.equal(rows_of(out), rows_of(again))
        site.check(again, low)


@pytest.mark.parametrize(("epilogue", "N", "K", "bounds"), SITES)
def test_a_row_has_the_same_bits_in_any_batch(
    epilogue: int, N: int, K: int, bounds: tuple[int, ...], hopper: torch.device
) -> None:
    site = Site(16, epilogue, N, K, make_stack(N, K, 8, 16, bounds, epilogue == GATED, hopper), hopper)
    whole = shrink(site.x, site.places, site.stack, site.shrinking).clone()
    together = rows_of(site.run(LowRankUpdate(whole, site.places, site.stack), pdl=False))
    for rows in (slice(0, 1), slice(3, 5), slice(5, 13), slice(7, 16)):
        few = Site(rows.stop - rows.start, epilogue, N, K, site.stack, hopper)
        few.x, few.places, few.weight, few.gain = site.x[rows].contiguous(), site.places[rows], site.weight, site.gain
        few.before, few.squares, few.places = site.before[rows], site.squares[rows].contiguous(), few.places.clone()
        low = shrink(few.x, few.places, few.stack, few.shrinking)
        has = few.places >= 0
        assert torch.equal(low[has], whole[rows][has])
        assert torch.equal(rows_of(few.run(LowRankUpdate(low, few.places, few.stack), pdl=False)), together[rows])
