"""Both forms of the gated activations against a statement in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.forms import FORMS, NATIVE, assert_close, operations_of


def exact_silu_mul(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def exact_gelu_mul(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, -1)
    return gate * (1 + ((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)).tanh()) / 2 * up


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("shape", [(1, 2), (9, 34)])
def test_silu_mul(shape: tuple[int, int], form: str, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    assert_close(operations_of(form, dtype).silu_mul(x), exact_silu_mul(x), form)


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("shape", [(1, 2), (9, 34)])
def test_gelu_mul(shape: tuple[int, int], form: str, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    assert_close(operations_of(form, dtype).gelu_mul(x), exact_gelu_mul(x), form)


@pytest.mark.parametrize("dtype", NATIVE)
def test_at_both_ends(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-200, 200, 1001), torch.randn(1001)]).to(dtype).unsqueeze(0)
    operations = operations_of("native", dtype)
    assert_close(operations.silu_mul(x), exact_silu_mul(x), "native")
    assert_close(operations.gelu_mul(x), exact_gelu_mul(x), "native")


@pytest.mark.parametrize("dtype", NATIVE)
def test_a_nan_stays_one(dtype: torch.dtype) -> None:
    x = torch.ones(1, 64, dtype=dtype)
    x[0, 5] = torch.nan
    assert operations_of("native", dtype).silu_mul(x)[0, 5].isnan()
