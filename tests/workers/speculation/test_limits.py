"""Drafts take what is left, and nobody loses anything for them."""

from __future__ import annotations

import collections
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.fakes.fake_engine import HashEngine, hash_token
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.speculation.speculation import AcceptanceWindow
from tests.workers.speculation.drafted_run import DraftedRun, guesses, tokens_of, told, user_config

VOCAB = 97


def oracle(tokens: Sequence[int], num_tokens: int) -> list[int]:
    """A whole sequence as `HashEngine` continues it."""
    tokens = list(tokens)
    for _ in range(num_tokens):
        tokens.append(hash_token(tokens, VOCAB))
    return tokens


def right(_: int, tokens: Sequence[int], most: int) -> Sequence[int]:
    return oracle(tokens, most)[len(tokens) :]


def wrong(_: int, tokens: Sequence[int], most: int) -> Sequence[int]:
    return [(token + 1) % VOCAB for token in right(0, tokens, most)]


def run(requests: Sequence[GenerateRequest], config: Any, block: int = 4, num_blocks: int = 200, **knobs: Any) -> Any:
    drafted = DraftedRun(HashEngine(VOCAB, num_blocks, block), config, **knobs)
    answers = drafted.answer(requests)
    drafted.close()
    return drafted, answers


def test_an_always_right_drafter_gives_all_its_tokens_and_one_more_in_every_step() -> None:
    drafted, answers = run([GenerateRequest("r", [3] * 16, SamplingSpec(1 + 8 * 8))], user_config(right), block=16)
    assert tokens_of(answers["r"]) == oracle([3] * 16, 65)[16:]
    assert [len(chunk.token_ids) for chunk in answers["r"]] == [1, *[8] * 8]
    assert [row.length for batch in drafted.batches[1:] for row in batch.generation] == [8] * 8
    rows = [row["specDecodingStats"] for row in drafted.executor.get_latest_iteration_stats()[1:]]
    assert [row["acceptanceLength"] for row in rows] == [8.0] * 8
    assert {(row["numDraftTokens"], row["numAcceptedTokens"], row["numRequestsWithDraftTokens"]) for row in rows} == {
        (7, 7, 1)
    }
    gauges = drafted.executor.gauges()
    assert (gauges["draft_tokens_total"], gauges["accepted_draft_tokens_total"]) == (56, 56)
    assert gauges["generation_tokens_total"] == 65


@pytest.mark.parametrize("max_tokens", range(1, 20))
def test_drafts_end_before_the_last_token(max_tokens: int) -> None:
    drafted, answers = run([GenerateRequest("r", [3] * 6, SamplingSpec(max_tokens))], user_config(right), block=8)
    assert tokens_of(answers["r"]) == oracle([3] * 6, max_tokens)[6:]
    lengths = [row.length for batch in drafted.batches[1:] for row in batch.generation]
    assert lengths == [8] * ((max_tokens - 1) // 8) + [(max_tokens - 1) % 8] * bool((max_tokens - 1) % 8)


def test_without_a_spare_block_drafts_stay_in_the_newest_tokens_block() -> None:
    """The cache holds both requests to their ends, and no more."""
    requests = [GenerateRequest(f"r{i}", [i] * 6, SamplingSpec(19)) for i in range(2)]
    drafted, answers = run(requests, user_config(right), block=4, num_blocks=12)
    for request in requests:
        assert tokens_of(answers[request.request_id]) == oracle(request.prompt_token_ids, 19)[6:]
    assert not drafted.num_preemptions
    tight, answers = run(requests, user_config(right), block=4, num_blocks=8, policy="MAX_UTILIZATION")
    for request in requests:
        assert tokens_of(answers[request.request_id]) == oracle(request.prompt_token_ids, 19)[6:]
    assert tight.num_preemptions, "for tokens that were right"


def test_beside_prompts_drafts_stay_in_the_newest_tokens_block() -> None:
    requests = [GenerateRequest(f"r{i}", [i] * (5 + 30 * i), SamplingSpec(40)) for i in range(4)]
    drafted, _ = run(requests, user_config(right), block=4, max_num_tokens=16)
    mixed = [row for batch in drafted.batches if batch.context for row in batch.generation]
    assert any(row.length > 1 for row in mixed)
    assert all(row.start // 4 == (row.stop - 1) // 4 for row in mixed)


def test_drafts_have_what_prompts_leave_of_a_step() -> None:
    requests = [GenerateRequest(f"r{i}", [i] * (9 + 8 * i), SamplingSpec(20)) for i in range(6)]
    drafted, answers = run(requests, user_config(right), block=16, max_num_tokens=24)
    assert {name: tokens_of(chunks) for name, chunks in answers.items()} == {
        r.request_id: oracle(r.prompt_token_ids, 20)[len(r.prompt_token_ids) :] for r in requests
    }
    assert all(batch.num_tokens <= 24 for batch in drafted.batches)
    assert any(batch.context and batch.drafts for batch in drafted.batches)
    assert any(batch.num_tokens == 24 and batch.context for batch in drafted.batches)


def test_it_rests_above_max_concurrency() -> None:
    requests = [GenerateRequest(f"r{i}", [i] * 8, SamplingSpec(20 + 20 * i)) for i in range(3)]
    drafted, _ = run(requests, user_config(right, max_concurrency=2), block=16)
    sizes = {len(batch.generation) for batch in drafted.batches if batch.drafts}
    assert sizes == {1, 2}
    assert any(len(batch.generation) == 3 for batch in drafted.batches)


def test_the_window_closes_for_good() -> None:
    window = AcceptanceWindow(3, 0.5)
    for num_accepted in (0, 0):
        window.note(num_accepted, 10)
    assert not window.is_closed, "it is not full yet"
    window.note(15, 10)
    assert not window.is_closed, "0.5 on average"
    window.note(0, 11)
    window.note(0, 11)
    assert not window.is_closed, "0.5 on average"
    window.note(0, 10)
    assert window.is_closed
    for _ in range(3):
        window.note(100, 10)
    assert window.is_closed
    never = AcceptanceWindow(0, 0.0)
    never.note(0, 10)
    assert not never.is_closed


def test_requests_with_few_accepted_tokens_end_all_drafting() -> None:
    requests = [GenerateRequest(f"r{i}", [i] * 8, SamplingSpec(30)) for i in range(8)]
    config = user_config(wrong, acceptance_window=3, acceptance_length_threshold=0.5)
    drafted, _ = run(requests, config, max_batch_size=1)
    owners = {row.request.request_id for batch in drafted.batches if batch.drafts for row in batch.generation}
    assert owners <= {"r0", "r1", "r2"}


def test_tokens_that_do_not_exist_and_stop_tokens_are_not_verified() -> None:
    sequence = oracle([3] * 8, 20)
    stop = sequence[12]

    def guess(_: int, tokens: Sequence[int], most: int) -> Sequence[int]:
        return [*right(0, tokens, 2), VOCAB, *right(0, tokens, most)[3:]]

    drafted, answers = run([GenerateRequest("r", [3] * 8, SamplingSpec(20))], user_config(guess), block=16)
    assert tokens_of(answers["r"]) == sequence[8:]
    assert max(row.length for batch in drafted.batches[1:] for row in batch.generation) == 3
    spec = SamplingSpec(20, stop_token_ids=(stop,))
    drafted, answers = run([GenerateRequest("r", [3] * 8, spec)], user_config(right), block=16)
    assert tokens_of(answers["r"]) == sequence[8 : sequence.index(stop, 8) + 1]
    assert all(stop not in draft for batch in drafted.batches for draft in batch.drafts.values())


def test_a_request_that_runs_ahead_finds_its_blocks() -> None:
    """One token per step each, the first would end before the second needs its room, so that the third would fit."""
    lengths = {"first": (32, 12), "second": (4, 40), "third": (20, 16)}
    requests = [
        GenerateRequest(name, [i] * num_prompt, SamplingSpec(num_output))
        for i, (name, (num_prompt, num_output)) in enumerate(lengths.items())
    ]

    def guess(number: int, tokens: Sequence[int], most: int) -> Sequence[int]:
        return right(0, tokens, most) if number == 2 else []

    drafted, answers = run(requests, user_config(guess), num_blocks=25)
    for request in requests:
        prompt, num_output = request.prompt_token_ids, request.sampling.max_tokens
        assert tokens_of(answers[request.request_id]) == oracle(prompt, num_output)[len(prompt) :]
    assert drafted.num_accepted


@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), num_blocks=st.integers(14, 40))
def test_any_load_in_any_room_ends_right(policy: Any, seed: int, num_blocks: int) -> None:
    """Also where the blocks hardly suffice, and some requests run ahead of others by their drafts."""
    rng = random.Random(seed)
    requests = [
        GenerateRequest(f"r{i}", [rng.randrange(3)] * rng.randint(1, 20), SamplingSpec(rng.randint(1, 30)))
        for i in range(rng.randint(1, 12))
    ]
    sequences = {i: oracle(r.prompt_token_ids, r.sampling.max_tokens) for i, r in enumerate(requests, 1)}
    guess = guesses(sequences, VOCAB)[rng.choice(["right", "mixed", "anything"])]
    config = user_config(guess, max_draft_len=rng.randint(1, 6))
    knobs = {"max_num_tokens": rng.choice([8, 30, 256]), "max_batch_size": rng.choice([2, 5, 16])}
    drafted, answers = run(requests, config, num_blocks=num_blocks, policy=policy, **knobs)
    for i, request in enumerate(requests, 1):
        assert tokens_of(answers[request.request_id]) == sequences[i][len(request.prompt_token_ids) :]
    if policy != "MAX_UTILIZATION":
        assert not drafted.num_preemptions


@pytest.mark.parametrize("name", ["right", "wrong", "mixed", "anything"])
def test_no_more_requests_pause_and_the_same_blocks_are_kept(name: str) -> None:
    requests = [
        GenerateRequest(f"r{i}", [i % 3] * 14 + [i], SamplingSpec(10 + i, num_logprobs=i % 2 or None))
        for i in range(12)
    ]
    plain, want = run(requests, None, policy="MAX_UTILIZATION")
    sequences = {i: oracle(r.prompt_token_ids, r.sampling.max_tokens) for i, r in enumerate(requests, 1)}
    drafted, got = run(requests, user_config(guesses(sequences, VOCAB)[name]), policy="MAX_UTILIZATION")
    assert {key: told(chunks) for key, chunks in got.items()} == {key: told(chunks) for key, chunks in want.items()}
    assert plain.num_preemptions == drafted.num_preemptions == 0
    assert _stored(drafted.kv) == _stored(plain.kv), "what was drafted in vain is in no block that others find"


def _stored(kv: KVCacheManager) -> collections.Counter[str]:
    events = [event["data"] for event in kv.take_events()]
    return collections.Counter(str(event.get("blocks") or event.get("block_hashes")) for event in events)
