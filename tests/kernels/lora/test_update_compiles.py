"""The CUDA C++ kernels of adapters in products of few rows compile for Hopper, which takes NVRTC and no GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tensorweave.kernels.linear import cuda_few
from tensorweave.kernels.lora import cuda_shrink

pytestmark = pytest.mark.skipif(find_spec("cuda") is None, reason="NVRTC comes with torch for GPUs")


def compiled(module: object, source: str, **constants: int) -> bytes:
    from tensorweave.kernels.cuda.program import compile_cubin

    path = Path(str(module.__file__)).with_name(source)  # type: ignore[attr-defined]
    return compile_cubin(path, ['-DTYPE="bf16"', *(f"-D{name}={value}" for name, value in constants.items())])


def test_shrink() -> None:
    assert compiled(cuda_shrink, "shrink.cu")


@pytest.mark.parametrize("epilogue", [0, 1, 2])
@pytest.mark.parametrize("row_groups", [1, 2])
@pytest.mark.parametrize("is_adapted", [0, 1])
def test_few(epilogue: int, row_groups: int, is_adapted: int) -> None:
    assert compiled(
        cuda_few, "few.cu", EPILOGUE=epilogue, SCALED=int(epilogue < 2), BIAS=0, WIDE_OUT=0, NT=row_groups, STAGES=5,
        ADAPTED=is_adapted,
    )  # fmt: skip
