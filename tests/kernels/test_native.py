"""The native kernels against plain statements in float64, at shapes with tails; the same bits in any batch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tensorweave.kernels.activation.reference import silu_mul
from tensorweave.kernels.argmax.reference import argmax
from tensorweave.kernels.attention.torch_backend import Planner, Span, paged_attention, paged_attention_reference
from tensorweave.kernels.heads.reference import HeadNorms, place_heads
from tensorweave.kernels.linear.reference import PackedLinear, TorchLinear, make_linear
from tensorweave.kernels.native import library as native
from tensorweave.kernels.native.library import load_native, native_for, use_threads
from tensorweave.kernels.norm.reference import add_rms_norm
from tests.kernels.test_kernels import MIXES, make_spans

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(load_native(torch.float32) is None, reason="no compiler")


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.double(), exact.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(1, 2), (33, 64), (70, 30), (96, 130)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(N: int, K: int, has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)
    linear = make_linear(weight, bias if has_bias else None)
    assert isinstance(linear, PackedLinear)
    rows = torch.randn(600, K + 3).to(dtype)
    for M in (0, 1, 2, 13, 14, 15, 29, 600):
        x = rows[:M, :K]  # rows with a stride
        exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
        close(linear(x), exact)
        wide = linear.to_float32(x)
        assert wide.dtype == torch.float32
        assert torch.equal(wide.to(dtype), linear(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(100, 256).to(dtype), torch.randn(40, 256).to(dtype)
    linear = make_linear(weight)
    assert isinstance(linear, PackedLinear)
    whole = linear(x)
    for threads in (2, 3):
        assert use_threads(threads)
        for rows in (slice(0, 1), slice(3, 8), slice(11, 28), slice(0, 40)):
            assert torch.equal(linear(x[rows]), whole[rows])


def test_float32_weights_that_fit_bfloat16_are_kept_so_with_the_same_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(100, 256).bfloat16().float()
    narrow = make_linear(weight, torch.randn(100))
    nearly = weight.clone()
    nearly[99, 255] += 1e-4
    wide = make_linear(nearly, narrow.bias_N if isinstance(narrow, PackedLinear) else None)
    assert isinstance(narrow, PackedLinear)
    assert isinstance(wide, PackedLinear)
    assert (narrow.packed.dtype, wide.packed.dtype) == (torch.bfloat16, torch.float32)
    for M in (1, 3, 14, 40):
        x = torch.randn(M, 256)
        assert torch.equal(narrow(x)[:, :99], wide(x)[:, :99])


def test_loops_of_several_callers_at_once() -> None:
    assert use_threads(3)
    linears = [make_linear(torch.randn(300, 128)) for _ in range(4)]
    x = torch.randn(40, 128)
    expected = [linear(x) for linear in linears]

    def work(i: int) -> bool:
        return all(torch.equal(linears[i](x), expected[i]) for _ in range(300))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4), timeout=200))


def test_a_forked_child_computes_too() -> None:
    assert use_threads(2)
    linear, x = make_linear(torch.randn(300, 128)), torch.randn(4, 128)
    expected = linear(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_the_kernels_do_not_take_is_left_to_torch() -> None:
    assert isinstance(make_linear(torch.randn(4, 5)), TorchLinear)
    assert isinstance(make_linear(torch.randn(4, 6, dtype=torch.float16)), TorchLinear)
    assert native_for(torch.empty(1, device="meta")) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (7, 33), (50, 576)])
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, update, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.rand(shape[1]).to(dtype)
    total = x + update
    exact = total.double() / (total.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    close(add_rms_norm(x, update, weight, 1e-5), exact)
    assert torch.equal(x, total)
    close(add_rms_norm(x, None, weight, 1e-5), exact)
    assert torch.equal(x, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_at_both_ends(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-200, 200, 1001), torch.randn(1001)]).to(dtype).unsqueeze(0)
    gate, up = x.double().chunk(2, -1)
    close(silu_mul(x), gate / (1 + (-gate).exp()) * up)


@pytest.mark.parametrize("V", [1, 15, 16, 100, 5000])
def test_argmax_is_the_first_of_the_largest(V: int) -> None:
    torch.manual_seed(0)
    x = torch.randint(-5, 5, (9, V)).float()
    x[3], x[4, :-1], x[5, 0] = -0.0, -torch.inf, -1e30
    x[6, -1] = 7.0
    assert torch.equal(argmax(x), x.argmax(-1))
    assert torch.equal(argmax(x[:0]), torch.empty(0, dtype=torch.int64))
    assert torch.equal(argmax(x.double()), x.argmax(-1))


@pytest.mark.parametrize("V", [1, 15, 64, 100, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # with the native kernel where there is one; without
def test_argmax_has_no_place_in_a_row_that_is_not_finite(V: int, dtype: torch.dtype) -> None:
    x = torch.randn(6, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0], x[1, V // 2], x[2, -1], x[3, 0] = torch.nan, torch.nan, torch.nan, torch.inf
    x[4] = -torch.inf
    assert argmax(x).tolist() == [-1, -1, -1, -1, -1, x[5].argmax()]


def test_a_nan_stays_one() -> None:
    for dtype in DTYPES:
        x = torch.ones(1, 64, dtype=dtype)
        x[0, 5] = float("nan")
        assert silu_mul(x)[0, 5].isnan()
        assert add_rms_norm(x, None, torch.ones(64, dtype=dtype), 1e-5).isnan().all()
        assert make_linear(torch.ones(3, 64, dtype=dtype))(x).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [True, False])
def test_place_heads_equals_its_torch_form(
    has_norms: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    T, N, K, H, P = 70, 3, 2, 64, 8
    heads, cache = torch.randn(T, N + 2 * K, H).to(dtype), torch.zeros(20, 2 * K, P, H, dtype=dtype)
    angles = torch.rand(T, H // 2) * 6
    norms = HeadNorms(torch.rand(H).to(dtype), torch.rand(H).to(dtype), 1e-5) if has_norms else None
    write = Planner(K, (0, 1), P, H, CPU, dtype).write_slots(torch.randperm(20 * P)[:T])
    arguments = torch.cat([angles.cos(), angles.sin()], -1), write, norms

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        into = cache.clone()
        return place_heads(heads.clone(), arguments[0], into, *arguments[1:]), into

    ours = run()
    monkeypatch.setattr("tensorweave.kernels.heads.reference.native_for", lambda _: None)
    monkeypatch.setattr("tensorweave.kernels.norm.reference.native_for", lambda _: None)
    for mine, theirs in zip(ours, run(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=3 * TOLERANCE[dtype], rtol=3 * TOLERANCE[dtype])


LONG = {**MIXES, "long": [(255, 1), (256, 1), (257, 1), (900, 1), (0, 1), (0, 5), (511, 1)]}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 6, 100, 300])
@pytest.mark.parametrize(
    ("num_kv_heads", "read_heads", "group", "H"), [(2, (0, 1), 3, 64), (2, (0, 1, 1), 1, 32), (1, (0,), 20, 96)]
)
@pytest.mark.parametrize("mix", [*MIXES, "long"])
def test_attention(
    mix: str, num_kv_heads: int, read_heads: tuple[int, ...], group: int, H: int, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    P, num_blocks = 8, 330
    spans = make_spans(LONG[mix], P, num_blocks)
    cache = torch.randn(num_blocks, 2 * num_kv_heads, P, H).to(dtype)
    heads = torch.randn(sum(span.length for span in spans), len(read_heads) * group + 2 * num_kv_heads, H).to(dtype)
    q = heads[:, : len(read_heads) * group]
    plan = Planner(num_kv_heads, read_heads, P, H, CPU, dtype).plan(spans, window)
    assert plan.native is not None
    kv_of_query = [head for head in read_heads for _ in range(group)]
    expected = paged_attention_reference(q, cache, spans, kv_of_query, window, H**-0.5)
    ours = paged_attention(q, cache, plan, H**-0.5)
    torch.testing.assert_close(ours, expected, atol=5 * TOLERANCE[dtype], rtol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40, 300])
@pytest.mark.parametrize(("group", "H", "P"), [(1, 32, 16), (3, 64, 16), (5, 48, 7), (20, 64, 1)])
def test_attention_has_the_same_bits_in_any_batch_any_chunks_and_on_any_number_of_threads(
    group: int, H: int, P: int, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    lengths = [(0, 700), (3, 1), (90, 40), (513, 1)]
    num_blocks = 2100 // P + 8
    spans = make_spans(lengths, P, num_blocks)
    cache, q = torch.randn(num_blocks, 4, P, H).to(dtype), torch.randn(742, 2 * group, H).to(dtype)
    planner = Planner(2, (0, 1), P, H, CPU, dtype)
    whole = paged_attention(q, cache, planner.plan(spans, window), 0.125)
    assert use_threads(3)
    for span in spans:
        for first, last in ((0, 1), (5, 7), (5, 38), (8, 9), (span.length - 70, span.length)):
            first, last = max(0, min(first, span.length - 1)), min(last, span.length)
            part = Span(0, last - first, span.start + first, span.blocks)
            rows = slice(span.first_row + first, span.first_row + last)
            again = paged_attention(q[rows], cache, planner.plan([part], window), 0.125)
            assert torch.equal(again, whole[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 6, 300])
def test_attention_does_not_touch_what_no_query_sees(window: int | None, dtype: torch.dtype) -> None:
    P = 8
    spans = make_spans([(0, 70), (500, 1), (310, 3), (20, 1)], P, 130)
    cache, q = torch.full((130, 2, P, 64), torch.nan).to(dtype), torch.randn(75, 3, 64).to(dtype)
    for span in spans:
        first = 0 if window is None else max(0, span.start + 1 - window)
        for i in range(first, span.stop):
            cache[span.blocks[i // P], :, i % P] = torch.randn(2, 64).to(dtype)
    plan = Planner(1, (0,), P, 64, CPU, dtype).plan(spans, window)
    assert paged_attention(q, cache, plan, 0.125).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_attention_to_a_few_keys_of_many(scale: float, dtype: torch.dtype) -> None:
    """From weights that are all alike to weights that vanish."""
    spans = make_spans([(0, 300), (290, 1)], 16, 45)
    cache, q = torch.randn(45, 2, 16, 64).to(dtype), torch.randn(301, 3, 64).to(dtype)
    expected = paged_attention_reference(q.double(), cache.double(), spans, (0, 0, 0), None, scale)
    ours = paged_attention(q, cache, Planner(1, (0,), 16, 64, CPU, dtype).plan(spans, None), scale)
    tolerance = TOLERANCE[dtype] * 5 * max(1, scale)
    torch.testing.assert_close(ours.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_it_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    try:
        assert native._library() is not None
        (built,) = (tmp_path / "tensorweave" / "kernels").iterdir()
        os.utime(built, (1, 1))
        native._library.cache_clear()
        assert native._library() is not None
        assert built.stat().st_mtime == 1
    finally:
        native._library.cache_clear()


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_torch_goes_on(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_COMPILER", compiler)
    native._library.cache_clear()
    try:
        assert native._library() is None
    finally:
        native._library.cache_clear()
    assert "no native CPU kernels" in caplog.text


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORWEAVE_NATIVE", "0")
    native._library.cache_clear()
    try:
        assert native._library() is None
    finally:
        native._library.cache_clear()
