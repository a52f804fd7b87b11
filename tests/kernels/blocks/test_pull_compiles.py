"""The kernel's plan of a unit, and that it compiles for what it says it is for, which takes NVRTC and no GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tensorweave.kernels.blocks import cuda_pull
from tensorweave.kernels.blocks.cuda_pull import compile_constants, heads_of_unit

PLANES = [512, 1024, 2048, 4096, 8192, 12288, 16384, 32768]


@pytest.mark.parametrize("plane_bytes", PLANES)
@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 8, 10, 16, 32])
def test_a_unit_fits_registers_and_ring(num_heads: int, plane_bytes: int) -> None:
    heads = heads_of_unit(num_heads, plane_bytes)
    constants = compile_constants(heads, plane_bytes)
    assert num_heads % heads == 0
    assert heads * plane_bytes <= 64 << 10
    rows = -(-heads * plane_bytes // 4096)
    assert (heads if plane_bytes > 4096 else rows) <= 8, "sums of a thread"
    assert constants["SLOT"] % 512 == 0
    assert constants["SLOT"] % 4096 == 0 or heads * plane_bytes <= constants["SLOT"]
    assert 3 <= constants["STAGES"] * constants["SLOT"] // constants["SLOT"] <= 32
    assert constants["STAGES"] * constants["SLOT"] <= 200 << 10


@pytest.mark.skipif(find_spec("cuda") is None, reason="NVRTC comes with torch for GPUs")
@pytest.mark.parametrize(("num_heads", "plane_bytes"), [(8, 4096), (8, 8192), (3, 2048), (1, 512), (2, 32768)])
def test_it_compiles(num_heads: int, plane_bytes: int) -> None:
    from tensorweave.kernels.cuda.program import compile_cubin

    constants = compile_constants(heads_of_unit(num_heads, plane_bytes), plane_bytes)
    source = Path(cuda_pull.__file__).with_name("pull.cu")
    assert compile_cubin(source, ['-DTYPE="bf16"', *(f"-D{name}={value}" for name, value in constants.items())])
