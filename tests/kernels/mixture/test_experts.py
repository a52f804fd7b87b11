"""Mixtures of experts in each form against a statement in float64; the same bits in any batch."""

from __future__ import annotations

from math import inf
from typing import Literal

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.mixture.native import NativeExperts
from tensorweave.kernels.mixture.reference import SILU, EachExpert, Expert, ExpertGroup, Experts, Swiglu
from tensorweave.kernels.mixture.routing import Routing, route
from tensorweave.kernels.native.library import use_threads
from tensorweave.kernels.quantize_integers import quantize_integers
from tensorweave.kernels.weights import quantize_weight
from tests.kernels.forms import FORMS, NATIVE, assert_close, needs_native, operations_of

CLAMPED = Swiglu(alpha=1.702, limit=0.7, shift=1.0)
RENORMALIZED = Routing(2, is_renormalized=True, is_rounded=False)


class RandomExperts:
    """The weights of `num_experts` experts, in `dtype`, with biases or without."""

    def __init__(
        self, num_experts: int, hidden: int, width: int, dtype: torch.dtype, *, has_bias: bool = False
    ) -> None:
        self.gate_up = [(torch.randn(2 * width, hidden) / hidden**0.5).to(dtype) for _ in range(num_experts)]
        self.down = [(torch.randn(hidden, width) / width**0.5).to(dtype) for _ in range(num_experts)]
        self.biases = [(torch.randn(2 * width).to(dtype), torch.randn(hidden).to(dtype)) for _ in range(num_experts)]
        self.has_bias = has_bias

    def group(self, form: str, routing: Routing, swiglu: Swiglu, here: range | None = None) -> ExpertGroup:
        make = operations_of(form, self.down[0].dtype).make_linear
        numbers = range(len(self.down)) if here is None else here
        none = (None, None)
        experts = [
            Expert(make(self.gate_up[e], gate_up_bias), make(self.down[e], down_bias))
            for e in numbers
            for gate_up_bias, down_bias in [self.biases[e] if self.has_bias else none]
        ]
        return ExpertGroup(tuple(experts), numbers.start, len(self.down), routing, swiglu)

    def make(self, form: str, routing: Routing, swiglu: Swiglu = SILU, here: range | None = None) -> Experts:
        return operations_of(form, self.down[0].dtype).make_experts(self.group(form, routing, swiglu, here))

    def exact(self, x: Tensor, logits: Tensor, routing: Routing, swiglu: Swiglu, here: range | None = None) -> Tensor:
        """Token by token in float64; the intermediate values are rounded to the type of x where the kernels do."""
        experts, weights = route(logits, routing)
        out = torch.zeros(x.shape, dtype=torch.float64)
        for row, (chosen, scores) in enumerate(zip(experts.tolist(), weights.double(), strict=True)):
            for e, score in zip(chosen, scores, strict=True):
                if here is None or e in here:
                    out[row] += score * self._one(x[row], e, swiglu)
        return out

    def _one(self, x: Tensor, e: int, swiglu: Swiglu) -> Tensor:
        bias, out_bias = (each.double() if self.has_bias else 0.0 for each in self.biases[e])
        gate, up = (self.gate_up[e].double() @ x.double() + bias).to(x.dtype).double().chunk(2)
        gate, up = gate.clamp(max=swiglu.limit), up.clamp(-swiglu.limit, swiglu.limit)
        active = gate / (1 + (-swiglu.alpha * gate).exp()) * (up + swiglu.shift)
        return self.down[e].double() @ active.to(x.dtype).double() + out_bias


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize(
    ("num_experts", "routing", "swiglu"),
    [
        (8, RENORMALIZED, SILU),
        (60, Routing(4, is_renormalized=False, is_rounded=True), SILU),
        (32, Routing(4, is_renormalized=True, is_rounded=True), CLAMPED),
        (3, Routing(3, is_renormalized=True, is_rounded=False), CLAMPED),
    ],
)
def test_experts(num_experts: int, routing: Routing, swiglu: Swiglu, form: str, dtype: torch.dtype) -> None:
    hidden, width = 70, 38
    weights = RandomExperts(num_experts, hidden, width, dtype, has_bias=swiglu is CLAMPED)
    experts = weights.make(form, routing, swiglu)
    assert isinstance(experts, NativeExperts if form == "native" else EachExpert)
    for num_rows in (0, 1, 2, 29):
        x, logits = torch.randn(num_rows, hidden).to(dtype), torch.randn(num_rows, num_experts).to(dtype)
        exact = weights.exact(x, logits, routing, swiglu)
        ours = experts(x, logits)
        assert ours.dtype == dtype
        assert_close(ours, exact, form, factor=2)


@pytest.mark.parametrize("dtype", NATIVE)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    """5,000 rows are more than are computed at once."""
    experts = RandomExperts(8, 64, 48, dtype).make("native", RENORMALIZED)
    x, logits = torch.randn(5000, 64).to(dtype), torch.randn(5000, 8).to(dtype)
    whole = experts(x, logits)
    for threads in (2, 3):
        assert use_threads(threads)
        for rows in (slice(0, 1), slice(3, 8), slice(11, 140), slice(2040, 2060), slice(4990, 5000), slice(0, 5000)):
            assert torch.equal(experts(x[rows], logits[rows]), whole[rows])


@needs_native
def test_float32_weights_that_fit_bfloat16_are_kept_so_with_the_same_bits() -> None:
    """What is added to make weights wide is multiplied by zeros, or is in the last column of the result."""
    weights = RandomExperts(4, 64, 32, torch.bfloat16)
    weights.gate_up, weights.down = [w.float() for w in weights.gate_up], [w.float() for w in weights.down]
    x, logits = torch.randn(50, 64), torch.randn(50, 4)
    x[:, -1] = 0
    narrow = weights.make("native", RENORMALIZED)
    for matrix in weights.gate_up[:3] + weights.down[:3]:
        matrix[-1, -1] += 1e-4
    mixed = weights.make("native", RENORMALIZED)
    for matrix in weights.gate_up[3], weights.down[3]:
        matrix[-1, -1] += 1e-4
    wide = weights.make("native", RENORMALIZED)
    assert [type(each) for each in (narrow, mixed, wide)] == [NativeExperts, EachExpert, NativeExperts]
    assert torch.equal(narrow(x, logits)[:, :-1], wide(x, logits)[:, :-1])
    torch.testing.assert_close(mixed(x, logits)[:, :-1], wide(x, logits)[:, :-1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_ranks_with_some_of_the_experts_add_up(form: str, dtype: torch.dtype) -> None:
    weights = RandomExperts(7, 32, 16, dtype)
    x, logits = torch.randn(20, 32).to(dtype), torch.randn(20, 7).to(dtype)
    parts = []
    for here in (range(4), range(4, 7)):
        part = weights.make(form, RENORMALIZED, here=here)(x, logits)
        assert_close(part, weights.exact(x, logits, RENORMALIZED, SILU, here), form, factor=2)
        parts.append(part.double())
    assert_close((parts[0] + parts[1]).to(dtype), weights.exact(x, logits, RENORMALIZED, SILU), form, factor=3)


@pytest.mark.parametrize("form", ["reference", "native"])
def test_the_lowest_of_equal_experts_is_taken(form: str) -> None:
    weights = RandomExperts(16, 32, 16, torch.bfloat16)
    routing = Routing(4, is_renormalized=True, is_rounded=True)
    logits = torch.randn(200, 16).mul(2).round().bfloat16()
    x = torch.randn(200, 32).bfloat16()
    exact = weights.exact(x, logits, routing, SILU)
    assert_close(weights.make(form, routing)(x, logits), exact, form, factor=2)


def test_the_plain_activation_is_that_of_a_gated_mlp() -> None:
    assert Swiglu(1.0, inf, 0.0) == SILU
    gate_up = torch.randn(5, 12)
    operations = operations_of("reference", torch.float32)
    torch.testing.assert_close(SILU(gate_up), operations.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize(("bits", "row_bits"), [(8, 16), (4, 16), (4, 8)])
def test_integer_weights(bits: Literal[4, 8], row_bits: Literal[8, 16], dtype: torch.dtype) -> None:
    """One call equals the products one after the other, and a row has the same bits in any batch."""
    operations, weights = operations_of("native", dtype), RandomExperts(6, 96, 64, dtype, has_bias=True)

    def make(weight: Tensor, bias: Tensor) -> Linear:
        grouped = quantize_integers(weight, bits=bits, group_size=32 if bits == 4 else None, row_bits=row_bits)
        return operations.make_linear(grouped, bias)

    experts = tuple(
        Expert(make(weights.gate_up[e], weights.biases[e][0]), make(weights.down[e], weights.biases[e][1]))
        for e in range(6)
    )
    group = ExpertGroup(experts[1:5], 1, 6, RENORMALIZED, CLAMPED)
    one_call, one_by_one = operations.make_experts(group), EachExpert(group)
    assert isinstance(one_call, NativeExperts)
    x, logits = torch.randn(3000, 96).to(dtype), torch.randn(3000, 6).to(dtype)
    whole = one_call(x, logits)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    if row_bits == 8:  # where an activation differs in its last bit, so may an integer of 8 bits
        tolerance = 3e-2
    torch.testing.assert_close(whole[:300], one_by_one(x[:300], logits[:300]), atol=tolerance, rtol=tolerance)
    for rows in (slice(0, 1), slice(5, 23), slice(2040, 2060), slice(0, 3000)):
        assert torch.equal(one_call(x[rows], logits[rows]), whole[rows])


@needs_native
def test_experts_of_other_forms_are_computed_one_after_the_other() -> None:
    operations = operations_of("native", torch.float32)
    weights = RandomExperts(4, 32, 16, torch.float32)
    linears = [
        Expert(operations.make_linear(quantize_weight(gate_up), None), operations.make_linear(down, None))
        for gate_up, down in zip(weights.gate_up, weights.down, strict=True)
    ]
    group = ExpertGroup(tuple(linears), 0, 4, RENORMALIZED, SILU)
    assert isinstance(operations.make_experts(group), EachExpert)


@pytest.mark.parametrize("dtype", NATIVE)
def test_a_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    experts = RandomExperts(4, 32, 16, dtype).make("native", RENORMALIZED)
    x, logits = torch.randn(3, 32).to(dtype), torch.randn(3, 4).to(dtype)
    whole = experts(x, logits)
    x[1], logits[1] = torch.nan, torch.nan
    out = experts(x, logits)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], whole[[0, 2]])
