"""Mixtures of experts on a GPU against float64: one token, few and many, sizes that no block divides, experts that
nobody chose; equal bits. In bfloat16 on a GPU, in float32 where kernels are interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.linear.triton_thin import ResidualSum
from tensorweave.kernels.mixture.routing import Routing, route
from tensorweave.kernels.mixture.stack import ExpertStack
from tensorweave.kernels.mixture.stack import add_experts as reference_add_experts
from tensorweave.kernels.mixture.tiling import ExpertTiling, MixtureTilings, choose_mixture_tilings
from tensorweave.kernels.mixture.triton import RoutedPairs, add_experts, num_squares
from tensorweave.kernels.mixture.triton import route as route_on_device

pytestmark = pytest.mark.gpu

EPSILON = 1e-6
QWEN = Routing(8, is_renormalized=True, is_rounded=True)
SMALL = [  # T, E, D, I
    (1, 8, 64, 40),
    (1, 60, 96, 24),
    (2, 9, 72, 24),
    (5, 8, 64, 64),
    (40, 17, 80, 40),
]
FULL = [(T, 128, 2048, 768) for T in (1, 2, 8, 32, 100, 256, 1000)] + [(4096, 16, 512, 768)]
GATED_128, DOWN_128 = ExpertTiling(128, 256, 64, 8, 3, True), ExpertTiling(128, 128, 64, 8, 4, True)


def row_type(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def poisoned(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), device=device, dtype=dtype)


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected).norm() / expected.norm()).item()


def make_stack(E: int, D: int, I: int, routing: Routing, device: torch.device) -> ExpertStack:  # noqa: E741
    dtype = row_type(device)
    gate_up = (torch.randn(E, 2 * I, D, device=device) / D**0.5).to(dtype)
    return ExpertStack(gate_up, (torch.randn(E, D, I, device=device) / I**0.5).to(dtype), routing)


def exact_update(x: Tensor, logits: Tensor, stack: ExpertStack, factor: Tensor | float) -> Tensor:
    """In float64; what is between the products is rounded where the kernels round it."""
    experts, weights = route(logits, stack.routing)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in range(stack.num_experts):
        rows, places = torch.nonzero(experts == e, as_tuple=True)
        gate_up = x[rows].double() @ stack.gate_up_E2ID[e].double().T
        gate_up = gate_up * (factor[rows] if isinstance(factor, Tensor) else factor)
        gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
        gated = (gate * gate.sigmoid() * up).to(x.dtype).double()
        part = (gated @ stack.down_EDI[e].double().T) * weights[rows, places].double().unsqueeze(1)
        out.index_add_(0, rows, part)
    return out


def make_rows(T: int, E: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x, and logits by which the last expert is never chosen, and of which some are equal."""
    dtype = row_type(device)
    logits = torch.randn(T, E, device=device).mul(4).round().div(4)
    logits[:, -1] = -100.0
    return torch.randn(T, D, device=device).to(dtype), logits.to(dtype)


def check(
    T: int, E: int, D: int, I: int, device: torch.device, pdl: bool, tilings: MixtureTilings | None = None,  # noqa: E741
    repeats: int = 0,
) -> None:  # fmt: skip
    S = min(8, E - 1)
    stack = make_stack(E, D, I, replace(QWEN, num_chosen=S), device)
    x, logits = make_rows(T, E, D, device)
    is_wide = tilings is not None and tilings.gated.is_wide
    tilings = tilings or choose_mixture_tilings(T, S, E, can_be_one=True, can_be_wide=False, itemsize=x.element_size())
    before, gain = torch.randn_like(x), torch.randn(D, device=device).to(x.dtype)
    squares = None if is_wide else torch.rand(T, 3, device=device) * D
    factor = 1.0 if squares is None else (squares.double().sum(1, keepdim=True) / D + EPSILON).rsqrt()

    def once() -> ResidualSum:
        found = poisoned(T, num_squares(D, tilings), device=device, dtype=torch.float32)
        result = ResidualSum(before.clone(), gain, poisoned(T, D, device=device, dtype=x.dtype), found)
        add_experts(x, logits, stack, result, tilings, squares_TQ=squares, epsilon=EPSILON, pdl=pdl)
        return result

    first = once()
    tolerance = 6e-3 if x.dtype == torch.bfloat16 else 1e-5
    update = exact_update(x, logits, stack, factor)
    assert relative_error(first.residual_MN.double() - before.double(), update) < 2 * tolerance
    assert relative_error(first.gained_MN, first.residual_MN.double() * gain.double()) < tolerance
    sums = first.residual_MN.double().square().sum(1)
    torch.testing.assert_close(first.squares_MQ.double().sum(1), sums, atol=0, rtol=1e-5)
    for _ in range(repeats):
        again = once()
        assert torch.equal(again.residual_MN, first.residual_MN)
        assert torch.equal(again.gained_MN, first.gained_MN)


@pytest.mark.parametrize(("T", "E", "D", "I"), SMALL)
def test_add_experts(T: int, E: int, D: int, I: int, device: torch.device, pdl: bool) -> None:  # noqa: E741
    check(T, E, D, I, device, pdl)


@pytest.mark.parametrize(("T", "E", "D", "I"), FULL)
def test_full_grids_repeat_their_bits(
    T: int, E: int, D: int, I: int, device: torch.device, pdl: bool, gpu_only: None  # noqa: E741
) -> None:  # fmt: skip
    check(T, E, D, I, device, pdl, repeats=20)


@pytest.mark.parametrize(("T", "E", "D", "I"), [(700, 9, 192, 72), (2000, 128, 2048, 768)])
def test_many_rows(T: int, E: int, D: int, I: int, hopper: torch.device) -> None:  # noqa: E741
    check(T, E, D, I, hopper, True, MixtureTilings(GATED_128, DOWN_128), repeats=10)


@pytest.mark.parametrize("T", [1, 3, 77])
def test_a_plain_sum(T: int, device: torch.device, pdl: bool) -> None:
    stack = make_stack(10, 64, 24, Routing(3, is_renormalized=False, is_rounded=False), device)
    x, logits = make_rows(T, 10, 64, device)
    ours, expected = torch.randn_like(x), torch.empty_like(x)
    expected.copy_(ours)
    tilings = choose_mixture_tilings(T, 3, 10, can_be_one=False, can_be_wide=False, itemsize=x.element_size())
    add_experts(x, logits, stack, ours, tilings, pdl=pdl)
    reference_add_experts(x, logits, stack, expected)
    assert relative_error(ours, expected.double()) < (8e-3 if x.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("E", [3, 128, 200])
@pytest.mark.parametrize("routing", [QWEN, Routing(2, is_renormalized=False, is_rounded=False)])
def test_routing_and_grouping(E: int, routing: Routing, device: torch.device, pdl: bool) -> None:
    routing = replace(routing, num_chosen=min(routing.num_chosen, E))
    T, S = 50, routing.num_chosen
    stack = make_stack(E, 16, 8, routing, device)
    _, logits = make_rows(T, E, 16, device)
    logits[7] = 0.0
    pairs = RoutedPairs.empty(T, stack, device)
    for each in (pairs.experts_TS, pairs.order, pairs.starts):
        each.fill_(-1)
    pairs.weights_TS.fill_(float("nan"))
    route_on_device(logits, stack, pairs, pdl=pdl)
    experts, weights = route(logits, routing)
    assert torch.equal(pairs.experts_TS.long(), experts)
    torch.testing.assert_close(pairs.weights_TS, weights, atol=1e-6, rtol=8e-3 if routing.is_rounded else 1e-5)
    assert torch.equal(pairs.order.long(), experts.flatten().argsort(stable=True))
    ends = experts.flatten().bincount(minlength=E).cumsum(0)
    assert pairs.starts.tolist() == [0, *ends.tolist()]
    assert pairs.starts[-1] == T * S


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_logits_that_are_not_numbers_choose_no_more_experts(device: torch.device, pdl: bool) -> None:
    stack = make_stack(8, 16, 8, Routing(2, is_renormalized=True, is_rounded=False), device)
    logits = torch.full((4, 8), float("nan"), device=device)
    pairs = RoutedPairs.empty(4, stack, device)
    route_on_device(logits, stack, pairs, pdl=pdl)
    assert pairs.experts_TS.tolist() == [[0, 1]] * 4
    assert sorted(pairs.order.tolist()) == list(range(8))
    assert pairs.starts.tolist() == [0, 4, *[8] * 7]


@pytest.mark.parametrize("T", [2, 64])
def test_a_row_has_the_same_bits_in_any_batch(T: int, device: torch.device, pdl: bool, gpu_only: None) -> None:
    stack = make_stack(32, 256, 128, replace(QWEN, num_chosen=4), device)
    x, logits = make_rows(T, 32, 256, device)
    tilings = choose_mixture_tilings(64, 4, 32, can_be_one=False, can_be_wide=False, itemsize=x.element_size())
    together = torch.zeros_like(x)
    add_experts(x, logits, stack, together, tilings, pdl=pdl)
    for row in range(0, T, 7):
        alone = torch.zeros_like(x[:1])
        add_experts(x[row : row + 1].contiguous(), logits[row : row + 1].contiguous(), stack, alone, tilings, pdl=pdl)
        assert torch.equal(alone[0], together[row])
