"""Bodies of every size are read alike; what a body does to its worker process affects no other body."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import psutil
import pytest

from tensorweave.cluster.errors import ModelNotFound, NotReady, Overloaded, RequestRejected
from tensorweave.cluster.priority import NICENESS
from tensorweave.cluster.wire import Frame
from tensorweave.router.bodies import worker_process
from tensorweave.router.bodies.body_queue import BodyQueue, BodyTooCostly
from tensorweave.router.bodies.pool import INLINE_BYTES, USUAL_BYTES, BodyPool
from tensorweave.router.bodies.quick_look import FORMING_FIELDS, may_take_long
from tensorweave.router.bodies.request_body import RequestBody
from tensorweave.router.bodies.served import ServedModel
from tensorweave.router.bodies.tasks import CHAT, COMPLETION, MESSAGES, RESPONSES, TOKENIZE, BodyTask
from tensorweave.router.bodies.worker import Priority
from tensorweave.router.bodies.worker_process import WorkerProcess
from tensorweave.router.openai.guided_fields import GuidedFields
from tests.router.serving import MODEL, PATIENCE_S, chat, completion, model_info, until
from tests.router.small_tokenizers import byte_level

SERVED = ServedModel((MODEL, "alias"), model_info(max_seq_len=2048), max_sequences=8)
PADDING = INLINE_BYTES + 1


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that is killed because it is late leaves its stopped workers behind."""
    monkeypatch.setattr(worker_process, "_EXIT_TIMEOUT_S", PATIENCE_S)


@asynccontextmanager
async def pool() -> AsyncIterator[BodyPool]:
    bodies = BodyPool(byte_level())
    try:
        async with asyncio.timeout(4 * PATIENCE_S):  # each parent of workers imports for two seconds of processor time
            yield bodies
    finally:
        await bodies.close()


def with_pool(use: Callable[[BodyPool], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with pool() as bodies:
            return await use(bodies)

    return asyncio.run(run())


def worker_of(queue: BodyQueue) -> WorkerProcess:
    worker = queue._readers[0].worker
    assert worker is not None
    return worker


def parent_of(bodies: BodyPool) -> asyncio.subprocess.Process:
    process = bodies._parent._process
    assert process is not None
    return process


def sent(fields: dict[str, Any], num_bytes: int = 0) -> bytes:
    """A body of at least so many bytes."""
    return orjson.dumps(fields).ljust(num_bytes)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
GOOD: list[tuple[BodyTask[RequestBody], dict[str, Any]]] = [
    (CHAT, chat("Grüße", temperature=0.5, seed=2**64 - 1, stop=["a", "é"], logit_bias={"5": 1.5})),
    (CHAT, chat("Hi", prompt_token_ids=[5, 6, 7], user="u" * 1000, bad_words=["capital", "é"])),
    (CHAT, chat("Hi", response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {}}})),
    (COMPLETION, completion("Hi", structured_outputs={"choice": ["a", "b"]}, n=2)),
    (CHAT, chat("Hi", chat_template_kwargs={"x": [1]}, max_completion_tokens=3, prompt_cache_key="k")),
    (CHAT, chat("Hi", tools=[TOOL], tool_choice="none", response_format={"type": "json_object"})),
    (MESSAGES, {**chat("Hi"), "max_tokens": 5, "stop_sequences": ["x"], "metadata": {"user_id": "u"}}),
    (RESPONSES, {"model": MODEL, "input": "Hi", "instructions": "S", "metadata": {"a": "b"}, "max_output_tokens": 9}),
    (COMPLETION, completion("The capital", echo=True, n=2, best_of=3, stop_token_ids=[4, 5])),
    (COMPLETION, completion(["one", "two"], stream=True, stream_options={"include_usage": True})),
    (COMPLETION, completion([[5, 6], [7]], echo=True, logprobs=3)),
    (COMPLETION, completion("Grüße 😺", echo=True, logprobs=0)),
    (COMPLETION, completion([5] * 300, truncate_prompt_tokens=20, model="alias")),
]
BAD: list[tuple[BodyTask[Any], dict[str, Any], type[RequestRejected], str]] = [
    (CHAT, chat(temperature=-1), RequestRejected, "temperature"),
    (CHAT, chat("x " * 5000), RequestRejected, "messages"),
    (CHAT, chat(model="other"), ModelNotFound, "model"),
    (COMPLETION, completion([99999]), RequestRejected, "prompt"),
    (COMPLETION, completion(n=9), RequestRejected, "n"),
    (COMPLETION, completion(stop_token_ids=[5] * 2000), RequestRejected, "stop_token_ids"),
    (COMPLETION, completion(bad_words=["日本語" * 100] * 50), RequestRejected, "bad_words"),
    (CHAT, chat(guided_json={"not": {}}), RequestRejected, "guided_json"),
    (TOKENIZE, {"prompt": 5}, RequestRejected, "prompt"),
]


def test_a_worker_reads_what_the_event_loop_reads() -> None:
    async def use(bodies: BodyPool) -> None:
        for task, fields in GOOD:
            inline, outside = [await bodies.run(task, sent(fields, size), SERVED) for size in (0, PADDING)]
            check_same(inline, outside)

    with_pool(use)


def check_same(inline: RequestBody, outside: RequestBody) -> None:
    assert outside.prompts == inline.prompts
    assert outside.request.telling == inline.request.telling
    assert outside.request.given_token_ids == inline.request.given_token_ids
    assert (outside.request.session is None) == (inline.request.session is None)
    assert outside.request.without_bulk() == inline.request.without_bulk()
    assert outside.specs == inline.specs
    assert (outside.api, outside.repeated) == (inline.api, inline.repeated)


def test_a_worker_refuses_what_the_event_loop_refuses() -> None:
    async def use(bodies: BodyPool) -> None:
        for task, fields, error, param in BAD:
            told: set[tuple[Any, ...]] = set()
            for size in (0, PADDING, USUAL_BYTES + 1):
                with pytest.raises(error) as caught:
                    await bodies.run(task, sent(fields, size), SERVED)
                told.add((type(caught.value), caught.value.param, caught.value.message))
            assert len(told) == 1, fields
            assert told.pop()[1] == param

    with_pool(use)


def test_what_a_body_was_made_from_stays_in_the_worker() -> None:
    unread = {
        "metadata": {"run": "m" * 10_000},
        "safety_identifier": "s" * 10_000,
        "prompt_cache_options": {"a": "b" * 10_000},
    }
    body = sent(completion("The capital " * 500, user="u" * 10_000, **unread))
    _, _, fields, prompts, _ = COMPLETION.run(body, byte_level(), SERVED).pack()
    assert len(fields) < 500
    assert [echo for _, echo in prompts] == [None]
    body = sent(chat(prediction={"type": "content", "content": "p" * 10_000}, **unread))
    _, _, fields, _, _ = CHAT.run(body, byte_level(), SERVED).pack()
    assert len(fields) < 500


def test_a_worker_that_dies_is_replaced_and_its_body_read_again() -> None:
    async def use(bodies: BodyPool) -> None:
        await bodies.run(COMPLETION, sent(completion(), PADDING), SERVED)
        worker = worker_of(bodies._usual)
        os.kill(worker.pid, signal.SIGKILL)
        assert (await bodies.run(COMPLETION, sent(completion(), PADDING), SERVED)).prompts

    with_pool(use)


def test_large_bodies_are_read_at_a_low_priority() -> None:
    async def use(bodies: BodyPool) -> None:
        for size in (PADDING, USUAL_BYTES + 1):
            await bodies.run(COMPLETION, sent(completion(), size), SERVED)
        usual, large = worker_of(bodies._usual), worker_of(bodies._large)
        own, *others = (os.getpriority(os.PRIO_PROCESS, pid) for pid in (0, usual.pid, large.pid))
        assert others == [own, own + NICENESS] or os.sched_getscheduler(large.pid) == os.SCHED_IDLE
        assert os.sched_getscheduler(usual.pid) == os.sched_getscheduler(0)
        assert [os.getsid(pid) for pid in (usual.pid, large.pid)] == [
            os.getsid(0)
        ] * 2  # else priorities count for nothing

    with_pool(use)


def test_all_workers_have_one_parent_and_end_with_it() -> None:
    """It has read the tokenizer, and imported what reads bodies, once."""

    async def use(bodies: BodyPool) -> None:
        for size in (PADDING, USUAL_BYTES + 1):
            await bodies.run(COMPLETION, sent(completion(), size), SERVED)
        [parent, usual, large] = processes = [
            psutil.Process(pid)
            for pid in (parent_of(bodies).pid, worker_of(bodies._usual).pid, worker_of(bodies._large).pid)
        ]
        assert [usual.ppid(), large.ppid()] == [parent.pid] * 2
        worker_of(bodies._large).close()
        await until(lambda: not large.is_running())
        assert usual.is_running()
        assert (await bodies.run(COMPLETION, sent(completion(), PADDING), SERVED)).prompts
        await bodies.close()
        await until(lambda: not any(process.is_running() for process in processes))

    with_pool(use)


def test_a_worker_in_the_middle_of_a_body_is_ended() -> None:
    async def use(bodies: BodyPool) -> None:
        await bodies.warm_up()
        worker = worker_of(bodies._usual)
        os.kill(worker.pid, signal.SIGSTOP)
        asked = asyncio.create_task(bodies.run(COMPLETION, sent(completion(), PADDING), SERVED))
        await asyncio.sleep(0)
        worker.close()
        await until(lambda: not psutil.pid_exists(worker.pid))
        assert (await asked).prompts  # by the next one

    with_pool(use)


def test_a_parent_that_dies_is_replaced() -> None:
    async def use(bodies: BodyPool) -> None:
        await bodies.run(COMPLETION, sent(completion(), PADDING), SERVED)
        parent = parent_of(bodies)
        parent.kill()
        await parent.wait()
        for size in (PADDING, USUAL_BYTES + 1):  # by the old worker, and by a new one
            assert (await bodies.run(COMPLETION, sent(completion(), size), SERVED)).prompts

    with_pool(use)


def test_a_worker_that_the_kernel_ends_says_so() -> None:
    """The kernel's signal for too much processor time is sent by hand, and nothing is written to the worker then."""

    async def use(bodies: BodyPool) -> None:
        await bodies.run(COMPLETION, sent(completion(), PADDING), SERVED)
        worker = worker_of(bodies._usual)
        os.kill(worker.pid, signal.SIGXCPU)
        assert await worker._next() is None
        assert worker.status == -signal.SIGXCPU

    with_pool(use)


def test_a_body_that_takes_too_much_processor_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not given to another worker, which reads the next one."""
    whole, given = WorkerProcess.ask, []

    async def ask(worker: WorkerProcess, frame: bytes) -> Frame | None:
        given.append(worker)
        if len(given) > 1:
            return await whole(worker, frame)
        worker.status = -signal.SIGXCPU
        return None

    monkeypatch.setattr(WorkerProcess, "ask", ask)

    async def use(bodies: BodyPool) -> None:
        with pytest.raises(BodyTooCostly, match="processor time"):
            await bodies.run(COMPLETION, sent(completion(), PADDING), SERVED)
        assert (await bodies.run(COMPLETION, sent(completion(), PADDING), SERVED)).prompts
        assert len(set(given)) == 2

    with_pool(use)


def test_a_body_that_takes_long_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker goes on at a low priority, and the next body has another one."""
    monkeypatch.setattr(worker_process, "SHORT_S", -1.0)
    monkeypatch.setattr(worker_process, "_LOOK_S", 0.0)
    lowered: list[int] = []
    monkeypatch.setattr(worker_process, "lower_priority", lowered.append)

    async def use(bodies: BodyPool) -> None:
        await bodies.warm_up()
        worker = worker_of(bodies._usual)
        os.kill(worker.pid, signal.SIGSTOP)
        asked = asyncio.create_task(bodies.run(COMPLETION, sent(completion(), PADDING), SERVED))
        await until(lambda: lowered == [worker.pid])
        os.kill(worker.pid, signal.SIGCONT)
        assert (await asked).prompts
        assert bodies._usual._readers[0].worker is None

    with_pool(use)


def test_a_small_body_that_asks_for_a_form_is_read_by_a_worker() -> None:
    forms: list[tuple[BodyTask[RequestBody], dict[str, Any]]] = [
        (COMPLETION, completion(guided_json={})),
        (CHAT, chat("Hi", response_format={"type": "json_object"})),
        (CHAT, chat("Hi", tools=[TOOL])),
        (RESPONSES, {"model": MODEL, "input": "Hi", "text": {"format": {"type": "json_object"}}}),
        (MESSAGES, {**chat("Hi"), "max_tokens": 5, "output_config": {"format": {"type": "json_schema", "schema": {}}}}),
    ]

    async def use(bodies: BodyPool) -> None:
        await bodies.warm_up()
        os.kill(worker_of(bodies._usual).pid, signal.SIGSTOP)
        asked = [asyncio.create_task(bodies.run(task, sent(fields), SERVED)) for task, fields in forms]
        assert (await bodies.run(COMPLETION, sent(completion()), SERVED)).prompts  # in the event loop
        assert not any(each.done() for each in asked)
        os.kill(worker_of(bodies._usual).pid, signal.SIGCONT)
        with_guides = [(await each).specs[0].guide is not None for each in asked]
        assert with_guides == [True, True, False, True, True]

    with_pool(use)


def test_all_fields_that_ask_for_a_form_are_known() -> None:
    assert set(GuidedFields.__annotations__) - {"model_config"} <= FORMING_FIELDS
    assert may_take_long(b"{'x': 1}")
    assert may_take_long(rb'{"\u0067uided_json": {}}')
    assert not may_take_long(b'{"prompt": "tools"}')


def test_a_worker_that_has_grown_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_GROWTH_BYTES", -1)

    async def use(bodies: BodyPool) -> None:
        for _ in range(2):
            assert (await bodies.run(COMPLETION, sent(completion(), PADDING), SERVED)).prompts
            assert bodies._usual._readers[0].worker is None

    with_pool(use)


def test_usual_bodies_do_not_wait_behind_a_large_one() -> None:
    async def use(bodies: BodyPool) -> None:
        await bodies.run(COMPLETION, sent(completion(), USUAL_BYTES + 1), SERVED)
        worker = worker_of(bodies._large)
        os.kill(worker.pid, signal.SIGSTOP)
        large = asyncio.create_task(bodies.run(COMPLETION, sent(completion(), USUAL_BYTES + 1), SERVED))
        assert (await bodies.run(COMPLETION, sent(completion(), PADDING), SERVED)).prompts
        assert not large.done()
        os.kill(worker.pid, signal.SIGCONT)
        assert (await large).prompts

    with_pool(use)


def test_a_further_worker_reads_while_the_first_has_a_body() -> None:
    """The first is stopped with a body: two others are read by the second, which started for them."""

    async def use(bodies: BodyPool) -> None:
        bodies._usual = bodies._queue("usual", Priority.USUAL, num_workers=2)
        await bodies.warm_up()
        assert bodies._usual._readers[1].worker is None
        first = worker_of(bodies._usual)
        os.kill(first.pid, signal.SIGSTOP)
        held = asyncio.create_task(bodies.run(TOKENIZE, sent_text(), SERVED))
        await until(lambda: bodies._usual._readers[0].is_working and bodies._usual._waiting.empty())
        others = [await bodies.run(TOKENIZE, sent_text(), SERVED) for _ in range(2)]
        assert not held.done()
        os.kill(first.pid, signal.SIGCONT)
        assert [await held] * 2 == others

    with_pool(use)


def test_a_worker_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(bodies: BodyPool) -> None:
        monkeypatch.setattr("sys.executable", "/bin/false")
        with pytest.raises(NotReady):
            await bodies.run(COMPLETION, sent(completion(), PADDING), SERVED)
        monkeypatch.undo()
        assert (await bodies.run(COMPLETION, sent(completion(), PADDING), SERVED)).prompts

    with_pool(use)


def test_one_more_than_may_wait_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(bodies: BodyPool) -> None:
        monkeypatch.setattr(bodies._usual, "_max_waiting", 2)
        await bodies.warm_up()
        worker = worker_of(bodies._usual)
        os.kill(worker.pid, signal.SIGSTOP)
        asked = [asyncio.create_task(bodies.run(TOKENIZE, sent_text(), SERVED))]
        await asyncio.sleep(0)
        await until(bodies._usual._waiting.empty)  # the worker has the first
        asked += [asyncio.create_task(bodies.run(TOKENIZE, sent_text(), SERVED)) for _ in range(2)]
        await until(lambda: bodies._usual._waiting.qsize() == 2)
        with pytest.raises(Overloaded):
            await bodies.run(TOKENIZE, sent_text(), SERVED)
        asked[1].cancel()
        os.kill(worker.pid, signal.SIGCONT)
        assert await asked[0] == await asked[2]

    with_pool(use)


def test_what_waits_when_the_service_ends_is_told() -> None:
    async def use(bodies: BodyPool) -> None:
        await bodies.warm_up()
        worker = worker_of(bodies._usual)
        os.kill(worker.pid, signal.SIGSTOP)
        asked = [asyncio.create_task(bodies.run(TOKENIZE, sent_text(), SERVED)) for _ in range(2)]
        await until(lambda: bodies._usual._waiting.qsize() == 1)
        await bodies.close()
        assert [type(error) for error in await asyncio.gather(*asked, return_exceptions=True)] == [NotReady] * 2
        await until(lambda: not psutil.pid_exists(worker.pid))

    with_pool(use)


def sent_text() -> bytes:
    return orjson.dumps({"prompt": "a " * INLINE_BYTES})
