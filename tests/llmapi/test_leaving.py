"""A consumer leaves an output early, by `break`, an error or a cancelled task: the request is cancelled, unless other
consumers wait."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from tensorweave import LLM, RequestOutput, SamplingParams
from tests.llmapi.small_llm import CACHE
from tests.workers.waiting import collect_until

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(directory, dtype="float32", kv_cache_config=CACHE) as made:
        yield made


def begin(llm: LLM, *, streaming: bool = True, n: int = 1) -> RequestOutput:
    """More than a minute's work."""
    slow = SamplingParams(max_tokens=3000, ignore_eos=True, n=n, logits_processor=lambda *given: time.sleep(0.03))
    return llm.generate_async([9, 8, 7], slow, streaming=streaming)


def check_cancelled(llm: LLM, output: RequestOutput) -> None:
    result = output.result(PATIENCE_S)
    assert {each.finish_reason for each in result.outputs} == {"cancelled"}
    assert output.aborted()
    give_up_s = time.monotonic() + PATIENCE_S
    while llm._runtime.dispatcher.num_running and time.monotonic() < give_up_s:
        time.sleep(0.01)
    assert llm._runtime.dispatcher.num_running == 0


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_left_by_break_is_cancelled(llm: LLM, n: int) -> None:
    output = begin(llm, n=n)
    for partial in output:
        assert partial is output
        break
    check_cancelled(llm, output)


def test_a_stream_left_by_an_error_is_cancelled(llm: LLM) -> None:
    output = begin(llm)

    def read() -> None:
        for _ in output:
            raise LookupError("the reader's own")

    with pytest.raises(LookupError):
        read()
    check_cancelled(llm, output)


@pytest.mark.parametrize("ending", ["break", "close", "cancel while waiting", "collect"])
def test_a_stream_left_in_an_event_loop_is_cancelled(llm: LLM, ending: str) -> None:
    output = begin(llm)

    async def read() -> None:
        if ending == "break":
            async for _ in output:
                break
        elif ending == "close":
            async with aclosing(aiter(output)) as iterator:
                await anext(iterator)
        elif ending == "cancel while waiting":
            task = asyncio.create_task(asyncio.wait_for(drain(output), PATIENCE_S))
            while not output.outputs[0].token_ids:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            iterator = aiter(output)
            await anext(iterator)
            cycle: list[Any] = [iterator]
            cycle.append(cycle)
            del iterator, cycle
            collect_until(output.aborted)
        assert output.aborted(), "at once, not when the loop ends"

    asyncio.run(read())
    check_cancelled(llm, output)


async def drain(output: RequestOutput) -> None:
    async for _ in output:
        pass


@pytest.mark.parametrize("wait", [lambda output: output.aresult(), lambda output: asyncio.wait_for(output, PATIENCE_S)])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_cancelled_await_cancels(llm: LLM, wait: Callable[[RequestOutput], Any], streaming: bool) -> None:
    output = begin(llm, streaming=streaming)

    async def read() -> None:
        task = asyncio.ensure_future(wait(output))
        while not output._num_consumers:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(read())
    check_cancelled(llm, output)


def test_wait_for_cancels_at_its_timeout_and_result_does_not(llm: LLM) -> None:
    output = begin(llm)
    with pytest.raises(TimeoutError):
        output.result(0.01)
    assert not output.aborted()

    async def read() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(output.aresult(), 0.01)

    asyncio.run(read())
    check_cancelled(llm, output)


def test_what_others_wait_for_goes_on(llm: LLM) -> None:
    hurry = threading.Event()

    def unhurried(*given: Any) -> None:
        hurry.wait(0.03)

    params = SamplingParams(max_tokens=200, ignore_eos=True, logits_processor=unhurried)

    async def read() -> None:
        output = llm.generate_async([9, 8, 7], params, streaming=True)
        iterator = aiter(output)
        await anext(iterator)
        awaited = asyncio.ensure_future(output.aresult())
        blocked = asyncio.create_task(asyncio.to_thread(output.result, PATIENCE_S))
        while output._num_consumers < 3:
            await asyncio.sleep(0.01)
        del iterator
        awaited.cancel()
        await asyncio.wait((awaited,))
        assert not output.aborted()
        hurry.set()
        assert (await blocked).outputs[0].length == 200

    asyncio.run(read())


def test_a_kept_iterator_goes_on_and_one_that_never_began_or_has_ended_cancels_nothing(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    output = llm.generate_async([9, 8, 7], params, streaming=True)
    iter(output)
    iterator = iter(output)
    lengths = [next(iterator).outputs[0].length, output.result(PATIENCE_S).outputs[0].length]
    assert (lengths[-1], output.outputs[0].finish_reason) == (12, "length")
    assert list(iterator) == []
    assert next(iterator, None) is None
    whole = llm.generate_async([9, 8, 7], params)
    for finished in whole:
        assert finished.outputs[0].length == 12
        break
    assert not output.aborted()
    assert not whole.aborted()


def test_an_unreferenced_llm_closes_itself_on_whatever_thread_it_is_collected(directory: Path) -> None:
    """Here on the thread of its own step loop, which closing waits for."""
    before = set(threading.enumerate())
    llm = LLM(directory, dtype="float32", kv_cache_config=CACHE)
    own = set(threading.enumerate()) - before
    workspace = llm.workspace
    assert workspace is not None
    is_let_go = threading.Event()

    def collect(*given: Any) -> None:
        if is_let_go.wait(PATIENCE_S):
            gc.collect()

    output = llm.generate_async([5], SamplingParams(max_tokens=3000, ignore_eos=True, logits_processor=collect))
    cycle: list[Any] = [llm]
    cycle.append(cycle)
    gc.disable()
    try:
        del llm, cycle
        is_let_go.set()
        assert output.result(PATIENCE_S).outputs[0].finish_reason == "cancelled"
    finally:
        gc.enable()
    for thread in own:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in own)
    for thread in threading.enumerate():
        if thread.name == "llm-closer":
            thread.join(PATIENCE_S)
    assert not workspace.exists()
