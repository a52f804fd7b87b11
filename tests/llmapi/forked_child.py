"""Run by test_forked.py: an LLM whose process forks, as a web server that loads before it forks does. Prints what the
child met, then what the parent's LLM still does."""

from __future__ import annotations

import asyncio
import atexit
import gc
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorweave import LLM, KvCacheConfig, SamplingParams

SLOW = SamplingParams(max_tokens=3000, ignore_eos=True, logits_processor=lambda *given: time.sleep(0.05))
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
PATIENCE_S = 60.0


def tell(name: str, call: Callable[[], Any]) -> None:
    began_s = time.monotonic()
    try:
        call()
        said = "no error"
    except RuntimeError as error:
        said = str(error)
    print(f"child {name}: {said}" if time.monotonic() - began_s < PATIENCE_S else f"child {name}: too late", flush=True)


def use_all(llm: LLM, running: Any, iterator: Any) -> None:
    for name, call in {
        "generate": lambda: llm.generate([5], SHORT),
        "generate nothing": lambda: llm.generate([]),
        "generate_async": lambda: llm.generate_async([5], SHORT),
        "preprocess": lambda: llm.preprocess([5]),
        "save": lambda: llm.save("nowhere"),
        "get_stats": llm.get_stats,
        "get_stats_async": llm.get_stats_async,
        "get_kv_cache_events": llm.get_kv_cache_events,
        "get_kv_cache_events_async": llm.get_kv_cache_events_async,
        "disaggregated_params": lambda: llm.disaggregated_params,
        "workspace": lambda: llm.workspace,
        "shutdown": llm.shutdown,
        "result": running.result,
        "aresult": lambda: asyncio.run(running.aresult()),
        "for": lambda: next(iter(running)),
        "iterator": lambda: next(iterator),
        "abort": running.abort,
    }.items():
        tell(name, call)


def main(directory: str, num_ranks: int) -> None:
    cache = KvCacheConfig(max_tokens=8192)
    more: dict[str, Any] = {} if num_ranks == 1 else {"tensor_parallel_size": num_ranks, "num_threads": 1}
    with LLM(directory, dtype="float32", kv_cache_config=cache, **more) as llm:
        workspace = llm.workspace
        finished = llm.generate([5], SHORT)
        running = llm.generate_async([9, 8, 7], SLOW, streaming=True)
        iterator = iter(running)
        next(iterator)
        if not (pid := os.fork()):
            use_all(llm, running, iterator)
            print("child finished:", pickle.loads(pickle.dumps(finished)) == finished.result(), flush=True)
            del iterator, running
            gc.collect()
            sys.exit(7)  # through the `with` block
        _, status = os.waitpid(pid, 0)
        print("parent saw", os.waitstatus_to_exitcode(status), flush=True)
        print("parent workspace:", isinstance(workspace, Path) and workspace.exists())
        next(iterator)
        print("parent still runs:", not running.aborted() and not running.finished)
        running.abort()
        print("parent generates:", llm.generate([5], SHORT).outputs == finished.outputs, flush=True)
    print("parent closed", flush=True)


def end_child(code: int) -> None:
    """What Python runs at the end of a process, without the native libraries' destructors: those may wait for threads
    that a child does not have."""
    atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    pid = os.getpid()
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except SystemExit as end:
        assert os.getpid() != pid
        end_child(int(end.code or 0))
