"""Routing against transformers' routers, and its rule for equal logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.mixture.routing import Routing, route


def statement(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """As transformers' routers state it; which of equal experts they take is not specified."""
    scores, experts = logits.float().softmax(-1).topk(routing.num_chosen, -1)
    if routing.is_renormalized:
        scores /= scores.sum(-1, keepdim=True)
    scores = scores.to(logits.dtype).float() if routing.is_rounded else scores
    order = experts.argsort(-1)
    return experts.gather(1, order), scores.gather(1, order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_renormalized", [False, True])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(1, 1), (8, 2), (60, 4), (128, 8)])
def test_as_transformers_routes(num_experts: int, num_chosen: int, is_renormalized: bool, dtype: torch.dtype) -> None:
    """With distinct logits, which are far enough from each other to have distinct scores."""
    logits = torch.stack([torch.randperm(num_experts) for _ in range(200)]).mul(0.25).to(dtype)
    for is_rounded in (False, True):
        routing = Routing(num_chosen, is_renormalized, is_rounded)
        experts, weights = route(logits, routing)
        their_experts, their_weights = statement(logits, routing)
        assert torch.equal(experts, their_experts)
        tolerance = 2**-8 if is_rounded and dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(weights, their_weights, atol=0, rtol=tolerance)


def test_of_equal_logits_the_lowest_expert_is_chosen() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [2.0, -0.0, 0.0, 5.0]])
    experts, weights = route(logits, Routing(2, is_renormalized=True, is_rounded=False))
    assert experts.tolist() == [[1, 2], [0, 1], [0, 3]]
    assert torch.equal(weights[:2], torch.full((2, 2), 0.5))
