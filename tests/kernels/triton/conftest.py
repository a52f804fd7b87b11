"""Where these tests run: on a CUDA GPU; or, with TRITON_INTERPRET=1, on a CPU, slowly and without dependent launch."""

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
def gpu_only(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a full-size grid needs a CUDA GPU")
