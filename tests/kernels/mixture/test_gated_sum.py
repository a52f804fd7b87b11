"""What a shared expert adds, in each form, against a statement in float64; the same bits in any batch."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.forms import FORMS, NATIVE, assert_close, operations_of


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 8), (1, 33), (19, 70), (300, 64)])
def test_add_gated(num_rows: int, width: int, form: str, dtype: torch.dtype) -> None:
    out, x = torch.randn(num_rows, width).to(dtype), torch.randn(num_rows, width).to(dtype)
    gate = (torch.randn(num_rows, 1) * 4).to(dtype)
    exact = out.double() + x.double() / (1 + (-gate.double()).exp())
    operations_of(form, dtype).add_gated(out, gate, x)
    assert_close(out, exact, form)


@pytest.mark.parametrize("dtype", NATIVE)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    out, x, gate = torch.zeros(40, 64, dtype=dtype), torch.randn(40, 64).to(dtype), torch.randn(40, 1).to(dtype)
    add_gated = operations_of("native", dtype).add_gated
    add_gated(out, gate, x)
    for row in range(40):
        alone = torch.zeros(1, 64, dtype=dtype)
        add_gated(alone, gate[row : row + 1], x[row : row + 1])
        assert torch.equal(alone[0], out[row])
