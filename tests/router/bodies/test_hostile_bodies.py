"""No body blocks the event loop: whatever is in it, no iteration of the loop takes more than 50 ms of processor time.

Processor time of the loop's own thread, so that other work on the machine changes nothing.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest

from tensorweave.cluster.packed_logprobs import PackedLogprobs
from tensorweave.router.bodies import pool as body_pool
from tensorweave.router.bodies.pool import BodyPool
from tensorweave.router.http.app import build_app
from tests.router import fake_fleet
from tests.router.calls import CHAT, COMPLETIONS
from tests.router.fake_fleet import FakeLink
from tests.router.fake_logprobs import fake_logprobs, with_logprobs
from tests.router.serving import PATIENCE_S, chat, completion, make_service, model_info, running, until

MAX_ITERATION_S = 0.050
CONTEXT = 8192
MB = 1_000_000
LONG = [5, 7, 9, 11] * 2000
COMBINATIONS = {
    "allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {"type": "integer"}}} for j in range(10)]} for i in range(4)]
}
"""10,000 of them: 0.6 s."""

REFUSED: list[tuple[str, str, Any]] = [
    ("a text of ones", COMPLETIONS, completion("1" * 2 * MB)),
    ("a text that may fit", COMPLETIONS, completion("😀" * 20_000)),
    ("many short messages", CHAT, {**chat(), "messages": [{"role": "user", "content": "a"}] * 60_000}),
    ("nested lists as prompts", COMPLETIONS, completion([[]] * 600_000)),
    ("a deep list", COMPLETIONS, b'{"prompt":' + b"[" * MB),
    ("ids as prompt", COMPLETIONS, completion([5] * MB)),
    ("unknown fields", COMPLETIONS, completion() | {f"k{index}": 1 for index in range(150_000)}),
    ("a large bias", COMPLETIONS, completion(logit_bias={str(index): 1 for index in range(150_000)})),
    ("many stop strings", COMPLETIONS, completion(stop=["a"] * 500_000)),
    ("many stop tokens", COMPLETIONS, completion(stop_token_ids=[5] * MB)),
    ("long bad words", COMPLETIONS, completion(bad_words=["é" * 1000] * 256)),
    ("a phase's long state", COMPLETIONS, completion(disaggregated_params={"encoded_opaque_state": "A" * 2 * MB})),
    ("half a body", COMPLETIONS, b'{"prompt":"' + b"x" * 2 * MB),
    ("no UTF-8", COMPLETIONS, b'{"prompt":"' + b"\xff" * 2 * MB + b'"}'),
    ("a long number", COMPLETIONS, b'{"max_tokens":' + b"9" * 2 * MB + b"}"),
    ("a long model", COMPLETIONS, completion(model="m" * 2 * MB)),
    ("a small schema of many combinations", COMPLETIONS, completion(guided_json=COMBINATIONS)),
]
ANSWERED: list[tuple[str, str, Any]] = [
    ("nested lists where they change nothing", COMPLETIONS, completion(metadata={"x": [[]] * 600_000})),
    ("a long user", COMPLETIONS, completion(user="u" * 2 * MB)),
    ("many long prompts", COMPLETIONS, completion([LONG] * 64, max_tokens=1)),
    ("many texts", COMPLETIONS, completion(["hello wonderful world " * 100] * 200, max_tokens=1)),
    ("a text that is cut", COMPLETIONS, completion("hello " * 100_000, truncate_prompt_tokens=100)),
    ("template arguments", CHAT, chat(chat_template_kwargs={"x": [[]] * 400_000})),
    ("text to tokens", "/tokenize", {"prompt": "hello " * 100_000, "return_token_strs": True}),
    ("tokens to text", "/detokenize", {"tokens": [5] * MB}),
    ("log-probabilities of a long prompt", COMPLETIONS, completion(LONG, prompt_logprobs=20, return_token_ids=True)),
    ("an echo with log-probabilities", COMPLETIONS, completion(LONG, echo=True, logprobs=20)),
    ("log-probabilities of a long answer", CHAT, chat(logprobs=True, top_logprobs=20, max_tokens=1000)),
    ("log-probabilities of many answers", CHAT, chat(n=64, logprobs=True, top_logprobs=20, max_tokens=20)),
]


class LoopIterations:
    """The longest iteration of an event loop, in seconds of its thread's processor time."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def watch(self) -> None:
        before_s = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now_s = time.thread_time()
            self.longest_s = max(self.longest_s, now_s - before_s)
            before_s = now_s


@contextmanager
def served() -> Iterator[tuple[int, LoopIterations]]:
    """A router in a thread of its own. Yields its port, and the iterations of its loop."""
    iterations, ports, is_over = LoopIterations(), list[int](), threading.Event()

    async def serve() -> None:
        service = make_service(FakeLink(model_info(CONTEXT), script=[5] * CONTEXT))
        service.bodies = BodyPool(service.tokenizer)
        async with running(build_app(service)) as url:
            await service.bodies.warm_up()
            watching = asyncio.create_task(iterations.watch())
            ports.append(int(url.rsplit(":", 1)[1]))
            await asyncio.to_thread(is_over.wait)
            watching.cancel()
            await service.bodies.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        asyncio.run(until(lambda: bool(ports) or not thread.is_alive()))
        yield ports[0], iterations
    finally:
        is_over.set()
        thread.join(PATIENCE_S)


def post(port: int, path: str, body: Any) -> int:
    """The answer's status, once the iteration of the loop that wrote the answer has ended."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S * 4)
    sent = body if isinstance(body, bytes) else orjson.dumps(body)
    connection.request("POST", path, sent, {"content-type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    connection.request("GET", "/version")
    connection.getresponse().read()
    connection.close()
    return answer.status


@pytest.fixture(autouse=True)
def quiet_collector() -> Iterator[None]:
    """The garbage collector must not scan, on the router's behalf, what the whole test run has left in memory."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def packed_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake link has the log-probabilities of the long prompt ready, as a socket would bring them."""
    row = fake_logprobs(5, 20, model_info().vocab_size)
    packed = PackedLogprobs.pack([row] * (len(LONG) - 1))

    def ready(chunk: Any, sampling: Any, prompt: Any, *, is_first: bool, vocab_size: int) -> Any:
        if sampling.num_prompt_logprobs is None or len(prompt) != len(LONG) or not is_first:
            return with_logprobs(chunk, sampling, prompt, is_first=is_first, vocab_size=vocab_size)
        chunk.prompt_logprobs = packed
        return chunk

    monkeypatch.setattr(fake_fleet, "with_logprobs", ready)


def check_turns(bodies: list[tuple[str, str, Any]], is_right: Callable[[int], bool]) -> None:
    with served() as (port, iterations):
        post(port, COMPLETIONS, completion())  # what is done but once
        for name, path, body in bodies:
            iterations.longest_s = 0.0
            status = post(port, path, body)
            assert is_right(status), (name, status)
            assert iterations.longest_s < MAX_ITERATION_S, (name, iterations.longest_s)


@pytest.mark.slow
def test_bodies_that_are_refused() -> None:
    check_turns(REFUSED, lambda status: status in (400, 404))


@pytest.mark.slow
def test_bodies_that_are_answered() -> None:
    check_turns(ANSWERED, lambda status: status == 200)


def test_the_measure_sees_a_body_that_is_read_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_pool, "INLINE_BYTES", 10 * MB)
    with served() as (port, iterations):
        post(port, *REFUSED[2][1:])
        assert iterations.longest_s > MAX_ITERATION_S
