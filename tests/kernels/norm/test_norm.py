"""Both forms of the norm against a statement in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.norm.reference import rms_norm
from tests.kernels.forms import FORMS, NATIVE, assert_close, operations_of

EPSILON = 1e-5


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 33), (5, 3, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype)
    assert_close(rms_norm(x, weight, EPSILON), exact_norm(x, weight), "reference")


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("shape", [(1, 5), (7, 33), (50, 576)])
def test_add_rms_norm(shape: tuple[int, int], form: str, dtype: torch.dtype) -> None:
    add_rms_norm = operations_of(form, dtype).add_rms_norm
    x, update, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.rand(shape[1]).to(dtype)
    total = x + update
    exact = exact_norm(total, weight)
    assert_close(add_rms_norm(x, update, weight, EPSILON), exact, form)
    assert torch.equal(x, total)
    assert_close(add_rms_norm(x, None, weight, EPSILON), exact, form)
    assert torch.equal(x, total)


@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_weights_that_count_from_an_offset(form: str, dtype: torch.dtype) -> None:
    """What is added to them is not rounded to the type of the weights."""
    x, weight = torch.randn(7, 100).to(dtype), (torch.randn(100) / 10).to(dtype)
    exact = exact_norm(x, 1 + weight.double())
    assert_close(operations_of(form, dtype).add_rms_norm(x, None, weight, EPSILON, 1.0), exact, form, factor=2)


@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_a_norm_of_rows_in_two_parts(form: str, dtype: torch.dtype) -> None:
    norm = operations_of(form, dtype).split_norm
    rows, weight = torch.randn(7, 70).to(dtype), torch.rand(52).to(dtype)
    exact = rows.double()
    exact[:, :52] = exact_norm(rows[:, :52], weight)
    parts = (rows[:, :33], weight[:33]), (rows[:, 33:52], weight[33:])
    squares = norm.squares(parts[0][0]) + norm.squares(parts[1][0])
    for part, its_weight in parts:
        norm.scale(part, squares, its_weight, 52, EPSILON)
    assert_close(rows, exact, form, factor=2)


@pytest.mark.parametrize("dtype", NATIVE)
def test_a_nan_stays_one(dtype: torch.dtype) -> None:
    x = torch.ones(1, 64, dtype=dtype)
    x[0, 5] = torch.nan
    assert operations_of("native", dtype).add_rms_norm(x, None, torch.ones(64, dtype=dtype), EPSILON).isnan().all()
