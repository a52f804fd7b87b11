"""Steps that overlap: the same answers, log-probabilities, KV events and books as one step at a time, whether a step is
computed as it is launched, as late as can be, or on a thread. And what other servers' overlap got wrong."""

from __future__ import annotations

import collections
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tensorweave.cluster.errors import LogitsNotFinite
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.fakes.fake_engine import HashEngine, HashStep, LateEngine, ThreadedEngine, hash_token
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.sampling.decoder import SamplingDecoder
from tensorweave.workers.step.pending import Pending, PendingTokens, StepLogits
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.resources import ResourceManager
from tests.workers.engine_drive import engine_args, random_prompts
from tests.workers.executor_answers import Answers, collect_answers
from tests.workers.stepped_engine import SteppedEngine
from tests.workers.tiny_models import make_model
from tests.workers.transfer_drive import hash_gang, run_disaggregated
from tests.workers.waiting import WAIT_S, wait_until

VOCAB, BLOCK = 97, 4
ENGINES = [HashEngine, LateEngine, ThreadedEngine]


class Run:
    """An executor that is given all requests before its first step."""

    def __init__(self, engine: Any, *, overlaps: bool, **scheduling: Any) -> None:
        num_events = 100_000
        self.kv = KVCacheManager(engine.info.num_blocks, engine.info.tokens_per_block, event_buffer_max_size=num_events)
        self.decoder = SamplingDecoder(keeps_tokens=isinstance(engine, DeviceEngine))
        self.batches: list[ScheduledBatch] = []
        self.executor = PyExecutor(
            engine=engine,
            scheduler=SimpleScheduler(self.kv, **scheduling),
            resources=ResourceManager([self.decoder.states, *engine.resource_managers, self.kv]),
            decoder=self.decoder,
            comm=SoloComm(),
            info=engine.info,
            disable_overlap_scheduler=not overlaps,
        )
        launch = engine.launch

        def recorded(batch: ScheduledBatch, resources: ResourceManager, before: PendingTokens) -> Pending[StepLogits]:
            self.batches.append(batch)
            pending: Pending[StepLogits] = launch(batch, resources, before)
            return pending

        engine.launch = recorded

    def answer(self, requests: Sequence[GenerateRequest], cancelled: Sequence[str] = ()) -> Answers:
        self.executor.enqueue_requests(requests)
        for name in cancelled:
            self.executor.cancel_request(name)
        self.executor.start()
        return self.collect([request.request_id for request in requests])

    def collect(self, names: Sequence[str]) -> Answers:
        return collect_answers(self.executor, names)

    def close(self) -> None:
        """All blocks are free, nothing is remembered, and the books are right."""
        wait_until(lambda: self.kv.available == self.kv.num_blocks)
        self.executor.shutdown(WAIT_S)
        assert self.kv.audit() == []
        assert not self.kv._retired
        assert not len(self.decoder.states)


def told(chunks: Sequence[TokenChunk]) -> Any:
    """Everything, without how it was cut into chunks."""
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    logprobs = [each for chunk in chunks for each in chunk.logprobs]
    logits = b"".join(chunk.logits for chunk in chunks), b"".join(chunk.context_logits for chunk in chunks)
    prompts = [chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs is not None]
    return tokens, logprobs, logits, prompts, chunks[-1].finish_reason, chunks[-1].stop_reason


def oracle(prompt: Sequence[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(hash_token(tokens, VOCAB))
    return tokens[len(prompt) :]


def tokens_of(chunks: Sequence[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def mixed_requests(count: int, seed: int, vocab: int = VOCAB, longest: int = 30) -> list[GenerateRequest]:
    """Greedy and seeded, with penalties, bans, log-probabilities and stop tokens; every third shares its beginning."""
    rng = random.Random(seed)
    stem = [rng.randrange(vocab) for _ in range(14)]
    kinds: list[Callable[[], dict[str, Any]]] = [
        dict,
        lambda: {"temperature": 1.0, "seed": rng.randrange(1 << 30)},
        lambda: {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.4},
        lambda: {"num_logprobs": 2, "num_prompt_logprobs": 1, "wants_generation_logits": True},
        lambda: {"temperature": 1.0, "top_p": 0.9, "top_p_decay": 0.9, "no_repeat_ngram_size": 2},
        lambda: {"stop_token_ids": tuple(rng.sample(range(vocab), vocab // 6)), "min_tokens": 2},
        lambda: {"wants_context_logits": True, "bad_words": ((1, 2), (3,))},
    ]
    requests = []
    for i in range(count):
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, longest))]
        spec = SamplingSpec(rng.randint(1, 14), **kinds[i % len(kinds)]())
        requests.append(GenerateRequest(f"r{i}", stem + prompt if i % 3 == 0 else prompt, spec))
    return requests


SCHEDULES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "chunked": {"max_num_tokens": 9},
    "few at a time": {"max_batch_size": 3},
    "preempted": {"policy": "MAX_UTILIZATION", "max_batch_size": 6, "max_num_tokens": 24},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_answers_are_those_of_one_step_at_a_time(engine: Any, schedule: str) -> None:
    num_blocks = 20 if schedule == "preempted" else 200
    requests = mixed_requests(28, seed=3)
    runs = [
        Run(make(VOCAB, num_blocks, BLOCK), overlaps=overlaps, **SCHEDULES[schedule])
        for make, overlaps in ((HashEngine, False), (engine, True))
    ]
    slow, fast = (run.answer(requests) for run in runs)
    assert {name: told(chunks) for name, chunks in fast.items()} == {name: told(c) for name, c in slow.items()}
    for run in runs:
        run.close()
    if schedule == "preempted":
        assert all(run.executor.gauges()["num_preemptions_total"] for run in runs)
    else:
        stored = [_stored(run.kv) for run in runs]
        assert stored[0] == stored[1]


def _stored(kv: KVCacheManager) -> collections.Counter[Any]:
    """Which blocks came into the tree, and which went."""
    events = [event["data"] for event in kv.take_events()]
    return collections.Counter(str(event.get("blocks") or event.get("block_hashes")) for event in events)


def test_the_events_of_one_request_come_in_the_same_order() -> None:
    request = GenerateRequest("r", list(range(30)), SamplingSpec(20))
    events = []
    for overlaps in (False, True):
        run = Run(LateEngine(VOCAB, 200, BLOCK), overlaps=overlaps, max_num_tokens=7)
        run.answer([request])
        run.close()
        events.append(run.kv.take_events())
    assert events[0] == events[1]


@pytest.mark.parametrize("is_on_device", [False, True])
@pytest.mark.parametrize("max_num_tokens", [32, 256])
def test_a_models_answers_are_those_of_one_step_at_a_time(
    max_num_tokens: int, is_on_device: bool, tmp_path: Path
) -> None:
    """Also where the newest tokens are on the device only; there the bits of log-probabilities depend on the batch."""
    make_model("llama", tmp_path)
    requests = mixed_requests(14, seed=5, vocab=200, longest=60)
    answers = []
    for overlaps in (False, True):
        engine = load_engine(engine_args(tmp_path), SoloComm(), is_on_device=is_on_device)
        run = Run(engine, overlaps=overlaps, max_num_tokens=max_num_tokens)
        exact = (lambda chunks: told(chunks)[:1]) if is_on_device else told
        answers.append({name: exact(chunks) for name, chunks in run.answer(requests).items()})
        run.close()
    assert answers[0] == answers[1]


def test_the_device_counts_tokens_again_after_a_preemption(tmp_path: Path) -> None:
    """Penalised requests overlap there: their newest tokens are counted before the host knows them."""
    make_model("llama", tmp_path)
    spec = SamplingSpec(14, temperature=0.8, repetition_penalty=1.4, frequency_penalty=0.3)
    requests = [
        GenerateRequest(f"r{i}", prompt, replace(spec, seed=i))
        for i, prompt in enumerate(random_prompts(10, 40, vocab=200))
    ]
    answers = []
    for overlaps in (False, True):
        args = engine_args(tmp_path, kv_cache_config={"max_tokens": 160})
        run = Run(
            load_engine(args, SoloComm(), is_on_device=True),
            overlaps=overlaps,
            policy="MAX_UTILIZATION",
            max_batch_size=6,
        )
        answers.append({name: tokens_of(chunks) for name, chunks in run.answer(requests).items()})
        assert run.executor.gauges()["num_preemptions_total"]
        run.close()
    assert answers[0] == answers[1]


def test_the_sequences_of_one_prompt_are_independent() -> None:
    """n = 4: the same prompt with four seeds, launched together and found in the tree by each other."""
    spec = SamplingSpec(10, temperature=1.5)
    requests = [GenerateRequest(f"r{i}", [5] * 21, replace(spec, seed=i)) for i in range(4)]
    answers = []
    for overlaps in (False, True):
        run = Run(LateEngine(VOCAB, 100, BLOCK), overlaps=overlaps, max_num_tokens=16)
        answers.append({name: told(chunks) for name, chunks in run.answer(requests).items()})
        run.close()
    assert answers[0] == answers[1]


def test_gangs_that_exchange_kv_answer_as_they_do_one_step_at_a_time() -> None:
    prompts = [prompt * 3 for prompt in random_prompts(12, 40, vocab=1000)]
    samplings = [
        SamplingSpec(12, num_logprobs=i % 3 or None, temperature=i % 2, seed=i, stop_token_ids=tuple(range(0, 1000, 9)))
        for i in range(len(prompts))
    ]
    answers = []
    for overlaps in (False, True):
        knobs: dict[str, Any] = {"num_blocks": 400, "overlaps": overlaps}
        with hash_gang(1, max_num_tokens=64, **knobs) as prefill, hash_gang(2, **knobs) as decode:
            got = run_disaggregated(prefill, decode, prompts, samplings)
            answers.append([(each.tokens, each.logprobs, each.finish_reason) for each in got])
            for gang in (prefill, decode):
                gang.wait_idle()
    assert answers[0] == answers[1]


# ---- what is launched


def test_no_step_is_wasted_on_an_end_that_is_known() -> None:
    """max_tokens is booked at the launch, in chunks and after a pause too; only a stop token costs a row."""
    run = Run(LateEngine(VOCAB, 100, BLOCK), overlaps=True, max_num_tokens=8)
    run.answer([GenerateRequest("r", list(range(20)), SamplingSpec(5))])
    run.close()
    assert [batch.num_tokens for batch in run.batches] == [8, 8, 4, 1, 1, 1, 1]

    stop = oracle([1, 2, 3], 3)[2]
    run = Run(LateEngine(VOCAB, 100, BLOCK), overlaps=True)
    chunks = run.answer([GenerateRequest("r", [1, 2, 3], SamplingSpec(9, stop_token_ids=(stop,)))])["r"]
    run.close()
    assert tokens_of(chunks) == oracle([1, 2, 3], 3)
    assert [batch.num_tokens for batch in run.batches] == [3, 1, 1, 1], "one row more than without overlap"


def test_a_request_that_is_closing_takes_no_place_in_the_next_batch() -> None:
    run = Run(LateEngine(VOCAB, 100, BLOCK), overlaps=True, max_batch_size=1)
    run.answer([GenerateRequest(name, [1, 2, 3], SamplingSpec(2), cache_salt=name) for name in "ab"])
    run.close()
    rows = [[row.request.request_id for row in batch.sampled] for batch in run.batches]
    assert rows == [["a"], ["a"], ["b"], ["b"]]


def test_one_step_is_launched_while_another_is_computed() -> None:
    """In the order launch 1, launch 2, settle 1, launch 3, …; without overlap each settles before the next."""
    for overlaps in (False, True):
        events: list[str] = []
        engine = _NotedEngine(events)
        run = Run(engine, overlaps=overlaps)
        run.answer([GenerateRequest("r", [1, 2], SamplingSpec(4))])
        run.close()
        one_by_one = [f"{verb} {n}" for n in range(1, 5) for verb in ("launch", "compute")]
        assert events == (
            ["launch 1", *(verb for n in range(1, 4) for verb in (f"launch {n + 1}", f"compute {n}")), "compute 4"]
            if overlaps
            else one_by_one
        )


class _NotedEngine(LateEngine):
    def __init__(self, events: list[str]) -> None:
        super().__init__(VOCAB, 100, BLOCK)
        self._events = events
        self._num_launched = self._num_computed = 0

    def begin(self, step: HashStep) -> Pending[StepLogits]:
        self._num_launched += 1
        self._events.append(f"launch {self._num_launched}")
        return super().begin(step)

    def compute(self, step: HashStep) -> StepLogits:
        self._num_computed += 1
        self._events.append(f"compute {self._num_computed}")
        return super().compute(step)


@pytest.mark.parametrize("overlaps", [True, False])
def test_tokens_are_told_once_the_next_step_is_launched(overlaps: bool) -> None:
    """Whoever is told of them needs the interpreter, which the step loop leaves while it waits for the engine."""
    events: list[str] = []
    run = Run(_NotedEngine(events), overlaps=overlaps)
    put = run.executor._outbox.put

    def noted(chunks: Sequence[TokenChunk]) -> None:
        events.append("tell")
        put(chunks)

    run.executor._outbox.put = noted  # type: ignore[method-assign]
    run.answer([GenerateRequest("r", [1, 2], SamplingSpec(3))])
    run.close()
    if overlaps:
        assert events[:5] == ["launch 1", "launch 2", "compute 1", "launch 3", "tell"]
        assert events[5:] == ["compute 2", "tell", "compute 3", "tell"], "no step is left to be launched"
    else:
        assert events == [verb for n in range(1, 4) for verb in (f"launch {n}", f"compute {n}", "tell")]


def test_the_host_works_while_the_engines_thread_computes() -> None:
    """With gates, not by time: step 2 is launched before step 1 is let go."""
    engine = _GatedEngine(VOCAB, 100, BLOCK)
    run = Run(engine, overlaps=True)
    run.executor.enqueue_request(GenerateRequest("r", [1, 2], SamplingSpec(6)))
    run.executor.start()
    for n in range(1, 6):
        wait_until(lambda n=n: len(run.batches) == n + 1)  # type: ignore[misc]
        assert engine.num_computed == n - 1
        engine.gate.release()
        wait_until(lambda n=n: engine.num_computed == n)  # type: ignore[misc]
    engine.gate.release()
    assert tokens_of(run.collect(["r"])["r"]) == oracle([1, 2], 6)
    run.close()


class _GatedEngine(ThreadedEngine):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = threading.Semaphore(0)
        self.num_computed = 0

    def compute(self, step: HashStep) -> StepLogits:
        assert self.gate.acquire(timeout=WAIT_S)
        logits = super().compute(step)
        self.num_computed += 1
        return logits


# ---- what settles first


def test_a_logits_processor_sees_every_token_before_its_own() -> None:
    seen: list[list[int]] = []

    def look(req_id: int, logits: Tensor, token_ids: list[list[int]], stream: object, client: object) -> None:
        seen.append(list(token_ids[0]))

    run = Run(LateEngine(VOCAB, 100, BLOCK), overlaps=True)
    run.executor.set_logits_processor("look", look)
    spec = SamplingSpec(6, logits_processors=("look",))
    run.answer([GenerateRequest("r", [1, 2], spec), GenerateRequest("other", [3], SamplingSpec(9))])
    run.close()
    whole = [1, 2, *oracle([1, 2], 6)]
    assert seen == [whole[:length] for length in range(2, 8)]


def test_a_pause_neither_loses_nor_doubles_the_token_that_is_pending() -> None:
    requests = [GenerateRequest(f"r{i}", [i] * 8, SamplingSpec(13)) for i in range(3)]
    run = Run(LateEngine(VOCAB, 8, BLOCK), overlaps=True, policy="MAX_UTILIZATION")
    answers = run.answer(requests)
    run.close()
    assert run.executor.gauges()["num_preemptions_total"] > 0
    for request in requests:
        chunks = answers[request.request_id]
        assert tokens_of(chunks) == oracle(request.prompt_token_ids, 13)
        assert [chunk.start for chunk in chunks] == list(range(13))


# ---- ends


@pytest.mark.parametrize("num_steps", range(1, 6))
def test_a_cancel_is_answered_at_once_and_its_blocks_come_back_with_the_last_step(num_steps: int) -> None:
    """In each moment of a life: while a chunk, the last chunk, or a decode is computed."""
    engine = SteppedEngine(VOCAB, 100, BLOCK)
    run = Run(engine, overlaps=True, max_num_tokens=8)
    run.executor.enqueue_request(GenerateRequest("r", list(range(20)), SamplingSpec(50)))
    run.executor.start()
    wait_until(lambda: len(run.batches) == 2)
    engine.allow(num_steps)
    wait_until(lambda: len(run.batches) == num_steps + 2)
    run.executor.cancel_request("r")
    engine.allow()
    last = run.collect(["r"])["r"][-1]
    assert last.finish_reason == "cancelled"
    assert run.kv.used > 0, "the step that holds it is not computed yet"
    engine.run_free()
    run.close()


def test_a_stop_and_a_cancel_together_free_the_blocks_once() -> None:
    stop = oracle([1, 2, 3], 2)[1]
    engine = SteppedEngine(VOCAB, 100, BLOCK)
    run = Run(engine, overlaps=True)
    run.executor.enqueue_request(GenerateRequest("r", [1, 2, 3], SamplingSpec(9, stop_token_ids=(stop,))))
    run.executor.start()
    engine.allow(1)
    wait_until(lambda: len(run.batches) == 3)
    run.executor.cancel_request("r")
    engine.run_free()
    chunks = run.collect(["r"])["r"]
    assert [chunk.is_last for chunk in chunks].count(True) == 1
    run.close()


def test_an_id_may_come_again_while_its_last_step_is_computed() -> None:
    engine = SteppedEngine(VOCAB, 100, BLOCK)
    run = Run(engine, overlaps=True)
    run.executor.enqueue_request(GenerateRequest("r", [1, 2], SamplingSpec(50)))
    run.executor.start()
    wait_until(lambda: len(run.batches) == 2)
    run.executor.cancel_request("r")
    engine.allow()
    run.collect(["r"])
    run.executor.enqueue_request(GenerateRequest("r", [3, 4], SamplingSpec(5)))
    engine.run_free()
    assert tokens_of(run.collect(["r"])["r"]) == oracle([3, 4], 5)
    run.close()


def test_chunks_that_sample_nothing_settle_too() -> None:
    """A gang that only computes prompts offers each chunk as soon as it has settled."""
    run = Run(LateEngine(VOCAB, 100, BLOCK), overlaps=True, max_num_tokens=8)
    run.answer([GenerateRequest("r", list(range(30)), SamplingSpec(1))])
    run.close()
    again = Run(LateEngine(VOCAB, 100, BLOCK), overlaps=True, max_num_tokens=8)
    answers = again.answer([GenerateRequest(f"r{i}", [*range(30), i], SamplingSpec(2)) for i in range(3)])
    assert all(len(tokens_of(chunks)) == 2 for chunks in answers.values())
    assert again.kv.stats()["reusedBlocks"] > 0
    again.close()


def test_what_a_failed_request_computed_is_wiped_before_anything_else_is_planned() -> None:
    engine = _PoisonedEngine(VOCAB, 100, BLOCK)
    run = Run(engine, overlaps=True)
    requests = [
        GenerateRequest("bad", [1, 2, 3, 4, 5, 90, 7, 8, 9], SamplingSpec(5)),
        GenerateRequest("good", [11, 12], SamplingSpec(20)),
    ]
    answers = run.answer(requests)
    assert isinstance(answers["bad"][-1].error, LogitsNotFinite)
    assert tokens_of(answers["good"]) == oracle([11, 12], 20)
    run.close()
    assert 90 not in engine._cache_BP


class _PoisonedEngine(LateEngine):
    """NaN after every prompt that has token 90 in it."""

    def logits_after(self, context: list[int]) -> Tensor:
        logits_V = super().logits_after(context)
        return logits_V * float("nan") if 90 in context[:9] else logits_V
