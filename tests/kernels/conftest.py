"""The same random numbers in each run; and a fixture that takes the native kernels away, so that the torch forms of the
ops are tested on any machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tensorweave.kernels.native import library as native


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(native, "_library", lambda: None)
        native.load_native.cache_clear()
        yield
    native.load_native.cache_clear()
