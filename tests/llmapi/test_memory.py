"""The memory of a model goes with its LLM, although collections pass over it while it lives."""

from __future__ import annotations

import weakref
from pathlib import Path

from tensorweave import LLM
from tensorweave.llmapi.engine import LocalEngine
from tests.llmapi.small_llm import CACHE, write_small_model
from tests.workers.waiting import collect_until


def test_nothing_holds_the_executor_of_an_llm_that_is_gone(tmp_path: Path) -> None:
    llm = LLM(write_small_model(tmp_path), kv_cache_config=CACHE)
    engine = llm._usable_runtime().engine
    assert isinstance(engine, LocalEngine)
    executor = weakref.ref(engine.executor)
    assert executor() is not None
    llm.shutdown()
    del llm, engine
    collect_until(lambda: executor() is None)
