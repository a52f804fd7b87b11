"""Low-rank updates of any mix of adapters against float64, and what they leave alone. In bfloat16 on a GPU, in float32
where kernels are interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.lora.stack import SiteStack
from tensorweave.kernels.lora.stack import add_updates as reference_add_updates

PARTS = [((), False), ((32, 48), False), ((24,), True)]


def make_stack(
    N: int, K: int, L: int, R: int, bounds: tuple[int, ...], is_interleaved: bool, device: torch.device
) -> SiteStack:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    P = len(bounds) + 1
    a = torch.randn(P, L, R, K, device=device).div(K**0.5).to(dtype)
    b = torch.randn(N, L, R, device=device).div(R**0.5).to(dtype)
    ranks = torch.randint(1, R + 1, (L,), dtype=torch.int32, device=device)
    for place, rank in enumerate(ranks.tolist()):
        a[:, place, rank:], b[:, place, rank:] = 0, 0
    return SiteStack(a, b, ranks, bounds, is_interleaved)


def exact(x: Tensor, places: Tensor, stack: SiteStack) -> Tensor:
    part, out = stack.part_of_outputs(), torch.zeros(len(x), len(stack.b_NLR), dtype=torch.float64, device=x.device)
    for t, place in enumerate(places.tolist()):
        if place >= 0:
            rank = int(stack.ranks_L[place])
            low = (stack.a_PLRK[:, place, :rank].double() @ x[t].double()).to(x.dtype).double()
            out[t] = (stack.b_NLR[:, place, :rank].double() * low[part]).sum(1)
    return out


@pytest.mark.parametrize(("bounds", "is_interleaved"), PARTS)
def test_the_reference(bounds: tuple[int, ...], is_interleaved: bool) -> None:
    stack = make_stack(56, 40, 3, 16, bounds, is_interleaved, torch.device("cpu"))
    x, places = torch.randn(9, 40), torch.tensor([0, -1, 2, 2, -1, 0, 1, 1, 0], dtype=torch.int32)
    before = torch.randn(9, 56)
    out = before.clone()
    reference_add_updates(x, places, stack, out)
    torch.testing.assert_close(out.double(), before.double() + exact(x, places, stack), atol=1e-5, rtol=1e-5)
    assert torch.equal(out[places < 0], before[places < 0])


@pytest.mark.gpu
@pytest.mark.parametrize(("bounds", "is_interleaved"), PARTS)
@pytest.mark.parametrize(("T", "N", "K", "L", "R"), [(1, 56, 40, 2, 16), (7, 200, 264, 3, 64), (70, 136, 520, 5, 32)])
def test_a_mixed_batch(
    T: int, N: int, K: int, L: int, R: int, bounds: tuple[int, ...], is_interleaved: bool, device: torch.device,
    pdl: bool,
) -> None:  # fmt: skip
    add_updates = pytest.importorskip("tensorweave.kernels.lora.triton").add_updates
    stack = make_stack(N, K, L, R, bounds, is_interleaved, device)
    x = torch.randn(T, K, device=device).to(stack.b_NLR.dtype)
    places = torch.randint(-1, L, (T,), dtype=torch.int32, device=device)
    before = torch.randn(T, N, device=device).to(x.dtype)
    out = before.clone()
    add_updates(x, places, stack, out, pdl=pdl)
    update = exact(x, places, stack)
    tolerance = 1e-2 if x.dtype == torch.bfloat16 else 1e-5
    assert (out.double() - before.double() - update).norm() <= tolerance * (update + before.double()).norm()
    assert torch.equal(out[places < 0], before[places < 0])


@pytest.mark.gpu
def test_full_grids_repeat_their_bits(device: torch.device, pdl: bool, gpu_only: None) -> None:
    add_updates = pytest.importorskip("tensorweave.kernels.lora.triton").add_updates
    stack = make_stack(28672, 4096, 8, 64, (14336,), True, device)
    x = torch.randn(300, 4096, device=device).bfloat16()
    places = torch.randint(-1, 8, (300,), dtype=torch.int32, device=device)
    first = torch.zeros(300, 28672, device=device).bfloat16()
    add_updates(x, places, stack, first, pdl=pdl)
    update = exact(x, places, stack)
    assert (first.double() - update).norm() < 1e-2 * update.norm()
    for _ in range(20):
        again = torch.zeros_like(first)
        add_updates(x, places, stack, again, pdl=pdl)
        assert torch.equal(again, first)


@pytest.mark.gpu
def test_without_adapters_nothing_changes(device: torch.device, pdl: bool) -> None:
    add_updates = pytest.importorskip("tensorweave.kernels.lora.triton").add_updates
    stack = make_stack(64, 64, 2, 16, (), False, device)
    x = torch.randn(20, 64, device=device).to(stack.b_NLR.dtype)
    before = torch.randn_like(x)
    out = before.clone()
    add_updates(x, torch.full((20,), -1, dtype=torch.int32, device=device), stack, out, pdl=pdl)
    assert torch.equal(out, before)
