"""A small random model with a small real tokenizer, for tests of the LLM class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorweave import KvCacheConfig, RequestOutput
from tests.router.small_tokenizers import byte_level
from tests.workers.tiny_models import make_model

CACHE = KvCacheConfig(max_tokens=8192)


def write_small_model(path: Path, **changes: Any) -> Path:
    make_model("llama", path, vocab_size=len(byte_level().backend), eos_token_id=None, **changes)
    byte_level().backend.save_pretrained(path)
    return path


def one(output: Any) -> RequestOutput:
    assert isinstance(output, RequestOutput)
    return output
