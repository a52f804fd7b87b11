"""Executors with and without drafts, and drafters that are right, wrong or anything."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensorweave.cluster.protocol import GenerateRequest, TokenChunk
from tensorweave.cluster.speculation_config import (
    NGramDecodingConfig,
    SpeculativeConfig,
    UserProvidedDecodingConfig,
)
from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.guided.guides import Guides
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.sampling.decoder import SamplingDecoder
from tensorweave.workers.speculation.build import build_speculation
from tensorweave.workers.speculation.user_drafter import DraftBatch
from tensorweave.workers.step.pending import Pending, PendingTokens, StepLogits
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.resources import ResourceManager
from tests.workers.executor_answers import Answers, collect_answers
from tests.workers.waiting import WAIT_S, wait_until

Guess = Callable[[int, Sequence[int], int], Sequence[int]]
"""(a request's number, its tokens, how many to draft)"""


class GuessingDrafter:
    def __init__(self, guess: Guess) -> None:
        self._guess = guess

    def prepare_draft_tokens(self, scheduled_requests: DraftBatch) -> None:
        for request in scheduled_requests.generation_requests:
            request.py_draft_tokens = self._guess(request.request_id, request.tokens, request.max_draft_len)


def guesses(recorded: Mapping[int, Sequence[int]], vocab_size: int) -> dict[str, Guess]:
    """`recorded` are whole sequences by their requests' numbers."""
    rng = random.Random(7)

    def right(number: int, tokens: Sequence[int], most: int) -> Sequence[int]:
        return recorded[number][len(tokens) : len(tokens) + most]

    def wrong(number: int, tokens: Sequence[int], most: int) -> Sequence[int]:
        return [(token + 1) % vocab_size for token in right(number, tokens, most)]

    def mixed(number: int, tokens: Sequence[int], most: int) -> Sequence[int]:
        draft = right(number, tokens, most)
        return [token if rng.random() < 0.8 else rng.randrange(vocab_size) for token in draft]

    def anything(number: int, tokens: Sequence[int], most: int) -> Sequence[int]:
        return [rng.randrange(-3, vocab_size + 3) for _ in range(rng.randint(0, most + 2))]

    return {"right": right, "wrong": wrong, "mixed": mixed, "anything": anything}


def user_config(guess: Guess, max_draft_len: int = 7, **fields: Any) -> UserProvidedDecodingConfig:
    return UserProvidedDecodingConfig(max_draft_len=max_draft_len, drafter=GuessingDrafter(guess), **fields)


def ngram_config(max_draft_len: int = 7, **fields: Any) -> NGramDecodingConfig:
    return NGramDecodingConfig(max_draft_len=max_draft_len, **fields)


class DraftedRun:
    """An executor that is given all requests before its first step."""

    def __init__(
        self,
        engine: Any,
        config: SpeculativeConfig | None,
        *,
        max_num_tokens: int = 256,
        guides: Guides | None = None,
        **knobs: Any,
    ) -> None:
        info = engine.info
        self.kv = KVCacheManager(info.num_blocks, info.tokens_per_block, event_buffer_max_size=100_000)
        self.states = SamplingDecoder(device=engine.pool.cache.device, keeps_tokens=isinstance(engine, DeviceEngine))
        self.batches: list[ScheduledBatch] = []
        self.speculating = build_speculation(
            config,
            self.states,
            SoloComm(),
            self.kv,
            max_num_tokens=max_num_tokens,
            max_samples=max_num_tokens,
            vocab_size=info.vocab_size,
            make_drafter=lambda config: config.drafter,
        )
        self.executor = PyExecutor(
            engine=engine,
            scheduler=SimpleScheduler(self.kv, max_num_tokens=max_num_tokens, counts_on_ends=config is None, **knobs),
            resources=ResourceManager(
                [self.states.states, *engine.resource_managers, *self.speculating.resource_managers, self.kv]
            ),
            decoder=self.speculating.decoder,
            speculation=self.speculating.speculation,
            guides=guides,
            comm=SoloComm(),
            info=info,
        )
        launch = engine.launch

        def recorded(batch: ScheduledBatch, resources: ResourceManager, before: PendingTokens) -> Pending[StepLogits]:
            self.batches.append(batch)
            pending: Pending[StepLogits] = launch(batch, resources, before)
            return pending

        engine.launch = recorded

    @property
    def num_preemptions(self) -> float:
        return self.executor.gauges()["num_preemptions_total"]

    @property
    def num_accepted(self) -> float:
        return self.executor.gauges()["accepted_draft_tokens_total"]

    def answer(self, requests: Sequence[GenerateRequest]) -> Answers:
        self.executor.enqueue_requests(requests)
        self.executor.start()
        return collect_answers(self.executor, [request.request_id for request in requests])

    def close(self) -> None:
        """All blocks are free, nothing is remembered, and the books are right."""
        wait_until(lambda: self.kv.available == self.kv.num_blocks)
        self.executor.shutdown(WAIT_S)
        assert self.kv.audit() == []
        assert not len(self.states.states)
        for manager in self.speculating.resource_managers:
            assert not len(manager)  # type: ignore[arg-type]


def told(chunks: Sequence[TokenChunk]) -> Any:
    """Everything, without how it was cut into chunks."""
    tokens = tokens_of(chunks)
    logprobs = [each for chunk in chunks for each in chunk.logprobs]
    logits = b"".join(chunk.logits for chunk in chunks), b"".join(chunk.context_logits for chunk in chunks)
    prompts = [chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs is not None]
    error = None if chunks[-1].error is None else chunks[-1].error.message
    return tokens, logprobs, logits, prompts, chunks[-1].finish_reason, chunks[-1].stop_reason, error


def tokens_of(chunks: Sequence[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def recording(requests: Sequence[GenerateRequest], answers: Answers) -> dict[int, list[int]]:
    """Whole sequences by the number that an executor gives to requests that come in this order."""
    return {
        number: [*request.prompt_token_ids, *tokens_of(answers[request.request_id])]
        for number, request in enumerate(requests, 1)
    }
