"""A user's code raises what would end a thread or an event loop: its request ends with an error at once, and all others
go on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tensorweave import LLM, SamplingParams
from tensorweave.cluster.errors import RequestRejected, TensorweaveError, WorkerLost
from tensorweave.router.text.tokens import Tokenizer
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.kv.manager import KVCacheManager
from tests.llmapi.small_llm import CACHE, one
from tests.router.small_tokenizers import byte_level

PATIENCE_S = 60.0
PROMPT = [9, 8, 7]
ENDERS = [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, RuntimeError]
enders = pytest.mark.parametrize("kind", ENDERS)


class Trap:
    """Raises `kind`, if that is set."""

    def __init__(self) -> None:
        self.kind: type[BaseException] | None = None

    def spring(self) -> None:
        if self.kind is not None:
            raise self.kind("enough")


TRAP = Trap()
DECODER_TRAP = Trap()


class TrappedTokenizer(Tokenizer):
    """A tokenizer whose `decode` is a user's code."""

    def decode(self, *given: Any, **named: Any) -> str:
        DECODER_TRAP.spring()
        return super().decode(*given, **named)


class TrappedScheduler(SimpleScheduler):
    def check(self, num_prompt_tokens: int, max_tokens: int) -> None:
        if num_prompt_tokens == 7:
            TRAP.spring()
        super().check(num_prompt_tokens, max_tokens)

    def schedule_request(self, active: Any) -> Any:
        if active and len(active[0].tokens) >= 30:
            TRAP.spring()
        return super().schedule_request(active)


class TrappedKVCache(KVCacheManager):
    def take_events(self) -> list[dict[str, Any]]:
        TRAP.spring()
        return super().take_events()


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    TRAP.kind = DECODER_TRAP.kind = None


def batched(*given: Any) -> None:
    TRAP.spring()


def make(directory: Path, **knobs: Any) -> LLM:
    return LLM(directory, dtype="float32", kv_cache_config=CACHE, batched_logits_processor=batched, **knobs)


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    slow = TrappedTokenizer(byte_level().backend, uses_rust=False)
    with make(directory, tokenizer=slow, scheduler=f"{__name__}:TrappedScheduler") as made:
        yield made


def unless_armed(is_armed: threading.Event) -> Callable[..., None]:
    """A logits processor that lets no token come before its trap is set, so that no answer is over by then."""

    def wait(*given: Any) -> None:
        assert is_armed.wait(PATIENCE_S)

    return wait


def check_goes_on(llm: LLM, fails: Callable[[], Any], words: str) -> None:
    """`fails` raises within its request; a request beside it, and the next one, end well."""
    beside = llm.generate_async([5], SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False))
    with pytest.raises(RequestRejected, match=words):
        fails()
    assert beside.result(PATIENCE_S).outputs[0].length == 20
    TRAP.kind = DECODER_TRAP.kind = None
    assert one(llm.generate("more", SamplingParams(max_tokens=3, ignore_eos=True))).outputs[0].length == 3


@enders
@pytest.mark.parametrize("n", [1, 2])
def test_in_a_logits_processor(llm: LLM, kind: type[BaseException], n: int) -> None:
    def end(*given: Any) -> None:
        raise kind("enough")

    params = SamplingParams(max_tokens=5, n=n, logits_processor=end)
    check_goes_on(llm, lambda: llm.generate(PROMPT, params), f"raised {kind.__name__}: enough")


@enders
def test_in_the_batched_logits_processor(llm: LLM, kind: type[BaseException]) -> None:
    TRAP.kind = kind
    params = SamplingParams(max_tokens=5, apply_batched_logits_processor=True)
    check_goes_on(llm, lambda: llm.generate(PROMPT, params), f"raised {kind.__name__}: enough")


@enders
def test_in_a_schedulers_check(llm: LLM, kind: type[BaseException]) -> None:
    TRAP.kind = kind
    check_goes_on(
        llm, lambda: llm.generate([1, 2, 3, 4, 5, 6, 7]), f"the scheduler's check raised {kind.__name__}: enough"
    )


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("n", [1, 2])
def test_in_a_tokenizer(llm: LLM, kind: type[BaseException], n: int) -> None:
    def fail() -> None:
        is_armed = threading.Event()
        held = SamplingParams(max_tokens=3000, n=n, ignore_eos=True, logits_processor=unless_armed(is_armed))
        future = llm.generate_async("text", held)
        DECODER_TRAP.kind = kind
        is_armed.set()
        future.result(PATIENCE_S)

    check_goes_on(llm, fail, f"code of the user's own raised {kind.__name__}: enough")


@enders
def test_in_the_step_loop_everybody_hears_of_it(directory: Path, kind: type[BaseException]) -> None:
    with make(directory, scheduler=f"{__name__}:TrappedScheduler") as llm:
        is_armed = threading.Event()
        held = SamplingParams(max_tokens=300, ignore_eos=True, logits_processor=unless_armed(is_armed))
        outputs = [llm.generate_async(PROMPT, held) for _ in range(2)]
        TRAP.kind = kind
        is_armed.set()
        for output in outputs:
            with pytest.raises(WorkerLost, match=f"the step loop failed: {kind.__name__}: enough"):
                output.result(PATIENCE_S)
        with pytest.raises(TensorweaveError):
            llm.generate(PROMPT)


@enders
def test_in_a_kv_managers_events(directory: Path, kind: type[BaseException]) -> None:
    with make(directory, kv_cache_manager=f"{__name__}:TrappedKVCache") as llm:
        slow = SamplingParams(max_tokens=3000, ignore_eos=True, logits_processor=lambda *given: time.sleep(0.03))
        output = llm.generate_async(PROMPT, slow)
        TRAP.kind = kind
        assert llm.get_kv_cache_events() == []
        with pytest.raises(WorkerLost, match=f"the KV cache manager failed: {kind.__name__}"):
            output.result(PATIENCE_S)


def test_no_thread_has_ended_of_it(llm: LLM) -> None:
    assert llm._runtime.engine.executor.is_alive  # type: ignore[attr-defined]
    assert llm._runtime.loop.loop.is_running()
