"""Which form of each operation is chosen for a device, a type and a head dim."""

from __future__ import annotations

import pytest
import torch

from tensorweave.kernels.activation.native import NativeSiluMul
from tensorweave.kernels.activation.reference import silu_mul
from tensorweave.kernels.attention.backend import AttentionBackend, AttentionShape
from tensorweave.kernels.attention.native import NativeAttention
from tensorweave.kernels.attention.torch_backend import TorchAttention
from tensorweave.kernels.heads.native import NativePlaceHeads
from tensorweave.kernels.heads.reference import place_heads
from tensorweave.kernels.linear.native import MakeNativeLinear
from tensorweave.kernels.linear.reference import make_linear
from tensorweave.kernels.native import library
from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.norm.native import NativeAddRmsNorm
from tensorweave.kernels.operations import Operations, choose_operations
from tests.kernels.forms import CPU, NATIVE, needs_native


def attention_of(operations: Operations, head_dim: int) -> AttentionBackend:
    return operations.make_attention(AttentionShape(1, (0,), head_dim, 16, frozenset({None})))


@needs_native
@pytest.mark.parametrize("dtype", NATIVE)
def test_a_cpu_with_a_compiler_gets_the_native_forms(dtype: torch.dtype) -> None:
    operations = choose_operations(CPU, dtype, 64)
    assert isinstance(operations.make_linear, MakeNativeLinear)
    assert isinstance(operations.add_rms_norm, NativeAddRmsNorm)
    assert isinstance(operations.silu_mul, NativeSiluMul)
    assert isinstance(operations.place_heads, NativePlaceHeads)
    assert isinstance(attention_of(operations, 64), NativeAttention)


@needs_native
def test_heads_that_are_no_whole_vectors_are_left_to_torch() -> None:
    native = load_native(torch.float32)
    assert native is not None
    for head_dim, placing, attention in (
        (native.vector_length, place_heads, NativeAttention),
        (native.vector_length // 2, place_heads, TorchAttention),
    ):
        operations = choose_operations(CPU, torch.float32, head_dim)
        assert operations.place_heads is placing
        assert isinstance(attention_of(operations, head_dim), attention)
        assert isinstance(operations.silu_mul, NativeSiluMul)


@needs_native
def test_attention_alone_may_be_plain() -> None:
    operations = choose_operations(CPU, torch.float32, 64, has_plain_attention=True)
    assert isinstance(attention_of(operations, 64), TorchAttention)
    assert isinstance(operations.place_heads, NativePlaceHeads)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float16), ("meta", torch.float32)])
def test_other_types_and_devices_get_the_references(device: str, dtype: torch.dtype) -> None:
    assert_reference(choose_operations(torch.device(device), dtype, 64))


def test_without_a_compiler_there_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_library", lambda: None)
    load_native.cache_clear()
    try:
        assert_reference(choose_operations(CPU, torch.float32, 64))
    finally:
        load_native.cache_clear()


def assert_reference(operations: Operations) -> None:
    assert (operations.make_linear, operations.silu_mul) == (make_linear, silu_mul)
    assert operations.place_heads is place_heads
    assert isinstance(attention_of(operations, 64), TorchAttention)
