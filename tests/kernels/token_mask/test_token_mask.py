"""Masked rows of logits against a loop over their bits."""

from __future__ import annotations

import pytest
import torch

from tensorweave.kernels.token_mask import reference
from tensorweave.kernels.token_mask.chosen import MaskTokens, choose_mask_tokens


@pytest.fixture(params=["reference", "native", pytest.param("triton", marks=pytest.mark.gpu)])
def mask_tokens(request: pytest.FixtureRequest) -> MaskTokens:
    if request.param == "reference":
        return reference.mask_tokens
    if request.param == "native":
        chosen = choose_mask_tokens(torch.device("cpu"))
        if chosen is reference.mask_tokens:
            pytest.skip("there is no compiler for native kernels")
        return chosen
    pytest.importorskip("triton")
    request.getfixturevalue("device")
    from tensorweave.kernels.token_mask import triton

    return triton.mask_tokens


@pytest.fixture
def where(mask_tokens: MaskTokens, request: pytest.FixtureRequest) -> torch.device:
    if mask_tokens.__module__.endswith("triton"):
        device: torch.device = request.getfixturevalue("device")
        return device
    return torch.device("cpu")


@pytest.mark.parametrize("V", [1, 31, 32, 33, 5000, 49_152])
def test_the_rows_keep_what_their_bits_allow(V: int, mask_tokens: MaskTokens, where: torch.device) -> None:
    torch.manual_seed(V)
    logits = torch.randn(7, V)
    allowed = torch.rand(4, V) < torch.tensor([0.0, 1.0, 0.5, 0.01]).unsqueeze(1)
    rows = torch.tensor([6, 0, 3, 2], dtype=torch.int32)
    expected = logits.clone()
    for row, is_allowed in zip(rows.tolist(), allowed, strict=True):
        expected[row, ~is_allowed] = -torch.inf
    masked = logits.to(where)
    mask_tokens(masked, packed(allowed).to(where), rows.to(where))
    assert torch.equal(masked.cpu(), expected)


def test_bits_beyond_the_vocabulary_change_nothing(mask_tokens: MaskTokens, where: torch.device) -> None:
    logits = torch.arange(3 * 40.0).view(3, 40).to(where)
    masks = torch.zeros(1, 2, dtype=torch.int32, device=where)
    mask_tokens(logits, masks, torch.tensor([1], dtype=torch.int32, device=where))
    expected = torch.arange(3 * 40.0).view(3, 40)
    expected[1] = -torch.inf
    assert torch.equal(logits.cpu(), expected)


def test_logits_that_are_not_finite_stay_where_they_are_allowed(mask_tokens: MaskTokens, where: torch.device) -> None:
    logits = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0, torch.nan]]).to(where)
    masks = torch.tensor([[0b01111]], dtype=torch.int32, device=where)
    mask_tokens(logits, masks, torch.zeros(1, dtype=torch.int32, device=where))
    assert logits[0].isnan().tolist() == [True, False, False, False, False]
    assert logits[0, 1:].tolist() == [torch.inf, -torch.inf, 1.0, -torch.inf]


def packed(allowed_NV: torch.Tensor) -> torch.Tensor:
    N, V = allowed_NV.shape
    words = torch.zeros(N, (V + 31) // 32 * 32, dtype=torch.int64)
    words[:, :V] = allowed_NV
    sums = (words.view(N, -1, 32) << torch.arange(32)).sum(2)
    return torch.where(sums >= 2**31, sums - 2**32, sums).to(torch.int32)
