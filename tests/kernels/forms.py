"""The forms in which operations are tested, and how close each must come to a statement in float64."""

from __future__ import annotations

from typing import Final

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.operations import Operations, choose_operations, reference_operations

CPU: Final = torch.device("cpu")
TOLERANCE: Final = {
    ("reference", torch.float32): 1e-5,
    ("reference", torch.bfloat16): 2e-2,
    ("reference", torch.float16): 3e-3,
    ("native", torch.float32): 2e-6,
    ("native", torch.bfloat16): 1e-2,
}
FORMS: Final = list(TOLERANCE)
NATIVE: Final = [dtype for form, dtype in FORMS if form == "native"]
needs_native = pytest.mark.skipif(load_native(torch.float32) is None, reason="no compiler")


def operations_of(form: str, dtype: torch.dtype, head_dim: int = 64) -> Operations:
    """Skips the test where there are no native kernels."""
    if form == "reference":
        return reference_operations(CPU, dtype)
    if load_native(dtype) is None:
        pytest.skip("no compiler")
    return choose_operations(CPU, dtype, head_dim)


def assert_close(ours: Tensor, exact: Tensor, form: str, factor: float = 1) -> None:
    tolerance = TOLERANCE[form, ours.dtype] * factor
    torch.testing.assert_close(ours.double(), exact.double(), atol=tolerance, rtol=tolerance)
