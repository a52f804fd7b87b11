"""Sampling rules: what they remember can be rolled back, and another kind of rule can be plugged in."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.fakes.fake_engine import HashEngine
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.sampling.decoder import SamplingDecoder
from tensorweave.workers.sampling.grammar_masks import GrammarMasks
from tensorweave.workers.sampling.host_copies import HostCopies
from tensorweave.workers.sampling.logit_edits import LogitEdits
from tensorweave.workers.sampling.rules import make_rules
from tensorweave.workers.sampling.state import SamplingRule, SamplingState, TokenHistory
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import ResourceManager
from tests.workers.sampling.test_sampling_definitions import VOCAB, random_spec

OPEN, CLOSE, MAX_DEPTH = 1, 2, 2
WAIT_S = 60.0


class Brackets(SamplingRule):
    """A grammar: brackets are closed before others are opened too deep, and none is closed that is not open."""

    def __init__(self) -> None:
        self._depths = [0]

    def advance(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._depths.append(self._depths[-1] + (token == OPEN) - (token == CLOSE))

    def roll_back(self, num_tokens: int) -> None:
        del self._depths[len(self._depths) - num_tokens :]

    def edit(self, row: int, edits: LogitEdits) -> None:
        depth = self._depths[-1]
        edits.ban(row, ([CLOSE] if depth == 0 else []) + ([OPEN] if depth == MAX_DEPTH else []))


def with_brackets(spec: SamplingSpec, history: TokenHistory) -> Iterator[SamplingRule]:
    yield from make_rules(spec, history)
    yield Brackets()


def is_balanced(tokens: Sequence[int]) -> bool:
    depths = list(itertools.accumulate((token == OPEN) - (token == CLOSE) for token in tokens))
    return all(0 <= depth <= MAX_DEPTH for depth in depths)


def apply_edits(edits: LogitEdits, logits: torch.Tensor) -> None:
    copies = HostCopies(logits.device)
    edits.apply(logits, copies, GrammarMasks(copies))


def edited(logits: torch.Tensor, state: SamplingState) -> tuple[torch.Tensor, dict[int, float]]:
    edits, logits = LogitEdits(), logits.clone()
    state.edit(0, edits)
    apply_edits(edits, logits)
    return logits, edits.top_p


@pytest.mark.parametrize("seed", range(12))
def test_a_state_that_was_rolled_back_is_as_if_the_tokens_had_never_been(seed: int) -> None:
    rng = random.Random(seed)
    spec = random_spec(rng)
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
    state, output = SamplingState(spec, prompt, with_brackets), list[int]()
    for _ in range(60):
        if rng.random() < 0.4:
            num_tokens = rng.randint(0, len(output))
            state.roll_back(num_tokens)
            del output[len(output) - num_tokens :]
        else:
            tokens = [rng.randrange(6) for _ in range(rng.randint(0, 9))]
            state.advance(tokens)
            output += tokens
        fresh = SamplingState(spec, prompt, with_brackets)
        fresh.follow([*prompt, *output])
        logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed))
        (got, top_p), (expected, expected_top_p) = edited(logits, state), edited(logits, fresh)
        assert torch.equal(got, expected)
        assert top_p == expected_top_p


def test_a_state_follows_tokens_that_were_taken_back() -> None:
    spec = SamplingSpec(99, no_repeat_ngram_size=2)
    state = SamplingState(spec, [5], make_rules)
    state.follow([5, 6, 7, 5])
    state.follow([5, 6])
    state.follow([5, 6, 5])
    assert edited(torch.zeros(1, VOCAB), state)[0].isneginf().nonzero()[:, 1].tolist() == [6]


@pytest.mark.parametrize("seed", range(6))
def test_drafts_are_verified_with_the_rules_that_their_rows_would_have_had(seed: int) -> None:
    """A step that computes rows for a request's next tokens and a draft of each: all rows are edited at once, and what
    the draft got wrong is rolled back. The tokens are those of one row a step."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    spec = random_spec(rng)
    spec = SamplingSpec(**{**spec.to_wire(), "temperature": 0.0, "embedding_bias": b""})
    rows = torch.from_numpy((numbers.normal(size=(40, VOCAB)) * 2).astype(np.float32))
    slow = decode_one_by_one(rows, spec)
    state, tokens = SamplingState(spec, [1, 2, 3], with_brackets), [1, 2, 3]
    num_accepted = 0
    while len(tokens) < 30:
        draft = [token if rng.random() < 0.7 else rng.randrange(VOCAB) for token in slow[len(tokens) :][:4]]
        first, edits = len(tokens), LogitEdits()
        logits = rows[first : first + len(draft) + 1].clone()
        for row, token in enumerate([*draft, -1]):
            state.edit(row, edits)
            state.advance([token])
        state.roll_back(len(draft) + 1)
        apply_edits(edits, logits)
        for token, drafted in zip(logits.argmax(dim=-1).tolist(), [*draft, -1], strict=True):
            tokens.append(token)
            if token != drafted:
                break
            num_accepted += 1
        state.follow(tokens)
    assert tokens == slow[: len(tokens)]
    assert num_accepted > 5


def decode_one_by_one(rows: torch.Tensor, spec: SamplingSpec) -> list[int]:
    request = LlmRequest("r", 0, [1, 2, 3], 3, spec, state=RequestState.GENERATION)
    decoder = SamplingDecoder(with_brackets)
    while len(request.tokens) < len(rows):
        logits = rows[len(request.tokens) :][:1].clone()
        batch = ScheduledBatch(generation=(StepRow(request, len(request.tokens) - 1, 1, 1),))
        (row,) = decoder.decode(logits, batch).rows
        assert isinstance(row, list)
        request.take_tokens(row)
    return request.tokens


def test_a_grammar_holds_through_batches_pauses_and_replays_without_the_executor_knowing_it() -> None:
    def run(requests: Sequence[GenerateRequest], num_blocks: int) -> dict[str, list[int]]:
        engine, decoder = HashEngine(8, num_blocks, tokens_per_block=4), SamplingDecoder(with_brackets)
        kv = KVCacheManager(num_blocks, 4)
        executor = PyExecutor(
            engine=engine,
            scheduler=SimpleScheduler(kv, policy="MAX_UTILIZATION", max_batch_size=4),
            resources=ResourceManager([decoder.states, kv]),
            decoder=decoder,
            comm=SoloComm(),
            info=engine.info,
        )
        executor.enqueue_requests(requests)
        executor.start()
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        going = set(tokens)
        while going:
            chunks = executor.await_responses(timeout_s=WAIT_S)
            assert chunks
            for chunk in chunks:
                tokens[chunk.request_id] += chunk.token_ids
                going -= {chunk.request_id} if chunk.is_last else set()
        executor.shutdown()
        assert len(decoder.states) == 0
        return tokens

    sampling = [SamplingSpec(40, temperature=2.0, seed=seed, stop_token_ids=()) for seed in range(6)]
    requests = [GenerateRequest(f"r{i}", [3 + i % 4, 4], spec) for i, spec in enumerate(sampling)]
    alone = {request.request_id: run([request], 64)[request.request_id] for request in requests}
    assert all(is_balanced(tokens) and {OPEN, CLOSE} <= set(tokens) for tokens in alone.values())
    assert run(requests, 24) == alone
    replayed = [
        GenerateRequest(r.request_id, [*r.prompt_token_ids, *alone[r.request_id][:15]], r.sampling, num_replayed=15)
        for r in requests
    ]
    assert run(replayed, 64) == {name: tokens[15:] for name, tokens in alone.items()}
