"""Matrix products by each form of weight against statements in float64; native rows: the same bits in any batch."""

from __future__ import annotations

import pytest
import torch

from tensorweave.kernels.linear.native import PackedLinear
from tensorweave.kernels.linear.reference import Linear, TorchLinear, make_linear
from tensorweave.kernels.native.library import use_threads
from tensorweave.kernels.weights import pack_weight, quantize_rows, quantize_weight
from tests.kernels.forms import FORMS, NATIVE, assert_close, needs_native, operations_of


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    linear = operations_of("native", weight.dtype).make_linear(weight, bias)
    assert isinstance(linear, PackedLinear)
    return linear


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize(("N", "K"), [(1, 2), (33, 64), (70, 30), (96, 130)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(N: int, K: int, has_bias: bool, form: str, dtype: torch.dtype) -> None:
    weight, bias = (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)
    linear = operations_of(form, dtype).make_linear(weight, bias if has_bias else None)
    assert isinstance(linear, PackedLinear if form == "native" else TorchLinear)
    rows = torch.randn(600, K + 3).to(dtype)
    for M in (0, 1, 2, 13, 14, 15, 29, 600):
        x = rows[:M, :K]  # rows with a stride
        exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
        assert_close(linear(x), exact, form)
        wide = linear.to_float32(x)
        assert wide.dtype == torch.float32
        assert torch.equal(wide.to(dtype), linear(x))


@pytest.mark.parametrize("dtype", NATIVE)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    weight, x = torch.randn(100, 256).to(dtype), torch.randn(40, 256).to(dtype)
    linear = packed_linear(weight)
    whole = linear(x)
    for threads in (2, 3):
        assert use_threads(threads)
        for rows in (slice(0, 1), slice(3, 8), slice(11, 28), slice(0, 40)):
            assert torch.equal(linear(x[rows]), whole[rows])


@needs_native
def test_float32_weights_that_fit_bfloat16_are_kept_so_with_the_same_bits() -> None:
    weight = torch.randn(100, 256).bfloat16().float()
    narrow = packed_linear(weight, torch.randn(100))
    nearly = weight.clone()
    nearly[99, 255] += 1e-4
    wide = packed_linear(nearly, narrow.bias_N)
    assert (narrow.weight.values.dtype, wide.weight.values.dtype) == (torch.bfloat16, torch.float32)
    for M in (1, 3, 14, 40):
        x = torch.randn(M, 256)
        assert torch.equal(narrow(x)[:, :99], wide(x)[:, :99])


@needs_native
@pytest.mark.parametrize("dtype", NATIVE)
def test_a_packed_weight_can_be_multiplied_by_torch_as_well(dtype: torch.dtype) -> None:
    weight = torch.randn(33, 64).to(dtype)
    packed = pack_weight(weight)
    assert packed is not None
    linear = make_linear(packed)
    assert isinstance(linear, TorchLinear)
    assert torch.equal(linear.weight_NK, weight)


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 5, 33), (9, 70, 256)])
def test_a_quantized_weight(M: int, N: int, K: int, form: str, dtype: torch.dtype) -> None:
    """Rounding to e4m3 changes an element by at most 1/16 of itself, except where it is below the smallest number."""
    weight, x, bias = torch.randn(N, K).to(dtype), torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    weight[0], x[0, 1:] = 0, 0
    made = quantize_weight(weight)
    linear = operations_of(form, dtype).make_linear(made, bias)
    assert linear(x).dtype == dtype
    rows, scales = quantize_rows(x)
    quantized = rows.double() * scales.double().unsqueeze(1)
    weights = made.values_NK.double() * made.scales_N.double().unsqueeze(1)
    torch.testing.assert_close(linear.to_float32(x).double(), quantized @ weights.T + bias, atol=1e-4, rtol=1e-5)
    error = (quantized @ weights.T - x.double() @ weight.double().T).abs()
    most = 0.13 * x.double().abs() @ weight.double().abs().T
    smallest = 2**-9 * K * x.double().abs().amax(1, keepdim=True) / 448 * weight.double().abs().amax()
    assert (error <= most + smallest).all()


@needs_native
def test_what_has_no_native_product_is_left_to_torch() -> None:
    native: Linear = operations_of("native", torch.float32).make_linear(torch.randn(4, 5), None)
    assert isinstance(native, TorchLinear)


@pytest.mark.parametrize("dtype", NATIVE)
def test_a_nan_stays_one(dtype: torch.dtype) -> None:
    x = torch.ones(1, 64, dtype=dtype)
    x[0, 5] = torch.nan
    assert packed_linear(torch.ones(3, 64, dtype=dtype))(x).isnan().all()
