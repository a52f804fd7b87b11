"""Both forms of argmax."""

from __future__ import annotations

import pytest
import torch

from tensorweave.kernels.argmax.native import NativeArgmax
from tensorweave.kernels.argmax.reference import NO_PLACE, NOTHING_LEFT, argmax
from tensorweave.kernels.operations import Argmax, choose_argmax
from tests.kernels.forms import CPU, needs_native

ARGMAX = [pytest.param(argmax, id="reference"), pytest.param(choose_argmax(CPU), id="chosen")]


@needs_native
def test_the_native_form_is_chosen_on_a_cpu() -> None:
    assert isinstance(choose_argmax(CPU), NativeArgmax)
    assert choose_argmax(torch.device("meta")) is argmax


@pytest.mark.parametrize("argmax", ARGMAX)
@pytest.mark.parametrize("V", [1, 15, 16, 100, 5000])
def test_argmax_is_the_first_of_the_largest(V: int, argmax: Argmax) -> None:
    x = torch.randint(-5, 5, (9, V)).float()
    x[3], x[4, :-1], x[5, 0] = -0.0, -torch.inf, -1e30
    x[6, -1] = 7.0
    assert torch.equal(argmax(x), x.argmax(-1))
    assert torch.equal(argmax(x[:0]), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("argmax", ARGMAX)
@pytest.mark.parametrize("V", [1, 15, 64, 100, 5000])
def test_argmax_has_no_place_in_a_row_that_is_not_finite(V: int, argmax: Argmax) -> None:
    x = torch.randn(6, V)
    x[0], x[1, V // 2], x[2, -1], x[3, 0] = torch.nan, torch.nan, torch.nan, torch.inf
    x[4] = -torch.inf
    assert argmax(x).tolist() == [NO_PLACE] * 4 + [NOTHING_LEFT, x[5].argmax()]
