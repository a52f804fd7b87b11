"""The small model that the LLM class is tested with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.llmapi.small_llm import write_small_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("llama"))
