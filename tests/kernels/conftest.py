"""The same random numbers in each run; and where tests of Triton kernels run: on a CUDA GPU, or, with
TRITON_INTERPRET=1, on a CPU, slowly and without dependent launch.

Triton 3.6's interpreter takes bfloat16 operands of `tl.dot` for integers and needs numpy before 2.4 for loops with
bounds that a kernel computes: there, products and attention in bfloat16 fail.
"""

from __future__ import annotations

import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> torch.device:
    if IS_INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1")
    return torch.device("cuda")


@pytest.fixture
def pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs a Hopper GPU")
    return device


@pytest.fixture
def gpu_only(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a full-size grid needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
