"""What is told beside the tokens, from whole executors: log-probabilities and logits of output and prompt equal a plain
forward's, whatever the batch, the chunks, the ranks, and also where another gang began the answer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensorweave.cluster.errors import RequestRejected, TensorweaveError
from tensorweave.cluster.protocol import (
    GenerateRequest,
    Logprob,
    ModelInfo,
    SamplingSpec,
    Ticket,
    TokenChunk,
    TokenLogprobs,
)
from tensorweave.workers.engine import engine as engine_module
from tensorweave.workers.executor.admission import check_fits
from tensorweave.workers.fakes.fake_engine import hash_token
from tests.workers.engine_drive import random_prompts
from tests.workers.plain_forward import PlainModel
from tests.workers.tiny_models import VOCAB, make_model
from tests.workers.transfer_drive import Gang, hash_gang, model_gang, stepped_gang
from tests.workers.waiting import WAIT_S

CLOSE = 2e-4


@dataclass
class Told:
    """All that one request was told."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    logits: bytes = b""
    context_logits: bytes = b""
    num_cached: int = 0
    first_start: int | None = None
    largest_piece: int = 0
    finish_reason: str | None = None
    error: TensorweaveError | None = None

    def take(self, chunk: TokenChunk) -> None:
        if chunk.token_ids:
            self.first_start = chunk.start if self.first_start is None else self.first_start
            assert chunk.start == self.first_start + len(self.tokens)
        self.tokens += chunk.token_ids
        self.logprobs += chunk.logprobs
        if chunk.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "told twice"
            assert chunk.token_ids
            self.prompt_logprobs = list(chunk.prompt_logprobs)
        self.logits += chunk.logits
        self.context_logits += chunk.context_logits
        self.largest_piece = max(self.largest_piece, len(chunk.context_logits))
        self.num_cached = chunk.num_cached_tokens
        self.finish_reason, self.error = chunk.finish_reason, chunk.error


def ask(gang: Gang, requests: Sequence[GenerateRequest]) -> list[Told]:
    told = {request.request_id: Told() for request in requests}
    gang.leader.enqueue_requests(requests)
    gather(gang, told)
    return list(told.values())


def gather(gang: Gang, told: dict[str, Told]) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while any(one.finish_reason is None and one.error is None for one in told.values()):
        assert time.monotonic() < give_up_s, "hangs"
        for chunk in gang.leader.await_responses(timeout_s=0.1):
            told[chunk.request_id].take(chunk)


def requests_of(
    prompts: Sequence[Sequence[int]], samplings: Sequence[SamplingSpec], name: str = "r"
) -> list[GenerateRequest]:
    return [GenerateRequest(f"{name}{i}", p, s) for i, (p, s) in enumerate(zip(prompts, samplings, strict=True))]


def rows_of(packed: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(packed, dtype="<f4").reshape(-1, VOCAB).copy())


def assert_right(told: TokenLogprobs, logits_V: torch.Tensor, token: int, num_top: int) -> None:
    exact_V = torch.log_softmax(logits_V.double(), -1)
    own, *top = told
    assert own.token_id == token
    assert own.rank == int((logits_V > logits_V[token]).sum()) + 1
    assert [p.token_id for p in top] == torch.topk(logits_V, num_top).indices.tolist()
    assert [p.rank for p in top] == list(range(1, num_top + 1))
    for p in told:
        assert p.logprob == pytest.approx(float(exact_V[p.token_id]), abs=CLOSE)


def alike(some: Sequence[TokenLogprobs], others: Sequence[TokenLogprobs]) -> bool:
    flat, other = ([p for token in tokens for p in token] for tokens in (some, others))
    return [(p.token_id, p.rank) for p in flat] == [(p.token_id, p.rank) for p in other] and np.allclose(
        [p.logprob for p in flat], [p.logprob for p in other], atol=CLOSE
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("llama", path)
    return path


@pytest.fixture(scope="module")
def plain(model: Path) -> PlainModel:
    return PlainModel(model)


@pytest.fixture(scope="module")
def gang(model: Path) -> Iterator[Gang]:
    with model_gang(model, 1, None, max_num_tokens=48) as made:
        yield made


FULL = SamplingSpec(
    12,
    temperature=0.9,
    top_p=0.95,
    top_p_decay=0.9,
    seed=7,
    repetition_penalty=1.3,
    presence_penalty=0.5,
    frequency_penalty=0.25,
    no_repeat_ngram_size=2,
    bad_words=((3,), (4, 5)),
    logit_bias=((9, 1.5),),
    num_logprobs=3,
    wants_generation_logits=True,
)
SPECS = [
    SamplingSpec(6, num_logprobs=0, num_prompt_logprobs=2),
    SamplingSpec(6, temperature=1.0, seed=3),
    SamplingSpec(5, num_prompt_logprobs=0, wants_context_logits=True),
    FULL,
    SamplingSpec(4, wants_context_logits=True, wants_generation_logits=True, num_logprobs=5),
    SamplingSpec(1, num_prompt_logprobs=1),
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("max_num_tokens", [24, 512])
def test_all_that_is_told_equals_a_plain_forward(
    model: Path, plain: PlainModel, size: int, max_num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together, in chunks and not, read in small pieces; and again, when the prompts are cached."""
    monkeypatch.setattr(engine_module, "PIECE_LOGITS", 7 * VOCAB)
    prompts = [*random_prompts(len(SPECS) - 1, 70, seed=4), [5]]
    with model_gang(model, size, None, max_num_tokens=max_num_tokens) as gang:
        for name in ("cold", "warm"):
            for prompt, spec, told in zip(prompts, SPECS, ask(gang, requests_of(prompts, SPECS, name)), strict=True):
                check_against(plain, prompt, spec, told)
        gang.wait_idle()


def check_against(plain: PlainModel, prompt: list[int], spec: SamplingSpec, told: Told) -> None:
    logits_TV = plain.logits([*prompt, *told.tokens])
    output_TV = logits_TV[len(prompt) - 1 : -1]
    assert len(told.tokens) == spec.max_tokens
    assert len(told.logprobs) == (spec.max_tokens if spec.num_logprobs is not None else 0)
    for one, row_V, token in zip(told.logprobs, output_TV, told.tokens, strict=False):
        assert_right(one, row_V, token, spec.num_logprobs or 0)
    if spec.num_prompt_logprobs is None:
        assert told.prompt_logprobs is None
    else:
        assert told.prompt_logprobs is not None
        assert len(told.prompt_logprobs) == len(prompt) - 1
        for one, row_V, token in zip(told.prompt_logprobs, logits_TV, prompt[1:], strict=False):
            assert_right(one, row_V, token, spec.num_prompt_logprobs)
    if spec.wants_context_logits:
        assert told.num_cached == 0
        torch.testing.assert_close(rows_of(told.context_logits), logits_TV[: len(prompt)], atol=CLOSE, rtol=1e-4)
    else:
        assert not told.context_logits
    wanted_TV = output_TV if spec.wants_generation_logits else output_TV[:0]
    torch.testing.assert_close(rows_of(told.logits), wanted_TV, atol=CLOSE, rtol=1e-4)


def test_same_seed_same_tokens_whatever_the_batch_and_the_ranks(model: Path, gang: Gang) -> None:
    prompts = random_prompts(8, 40, seed=9)
    samplings = [
        replace(FULL, temperature=1.0, seed=i) if i % 2 else SamplingSpec(12, temperature=1.0, seed=i) for i in range(8)
    ]
    requests = requests_of(prompts, samplings)
    alone = [ask(gang, [request])[0].tokens for request in requests]
    assert [one.tokens for one in ask(gang, requests)] == alone
    with model_gang(model, 2, None) as split:
        assert [one.tokens for one in ask(split, requests)] == alone


def test_an_answer_that_another_gang_began_goes_on_as_it_would_have(gang: Gang) -> None:
    prompt = random_prompts(1, 60, seed=2)[0]
    stop = SamplingSpec(
        12, min_tokens=7, temperature=1.0, seed=5, stop_token_ids=tuple(range(0, VOCAB, 2)), num_logprobs=1
    )
    for spec in (FULL, stop, replace(FULL, num_prompt_logprobs=1)):
        whole = ask(gang, [GenerateRequest("whole", prompt, spec)])[0]
        for num in range(1, len(whole.tokens)):
            again = GenerateRequest(f"from{num}", [*prompt, *whole.tokens[:num]], spec, num_replayed=num)
            rest = ask(gang, [again])[0]
            assert (rest.tokens, rest.finish_reason, rest.first_start) == (whole.tokens[num:], whole.finish_reason, num)
            assert alike(rest.logprobs, whole.logprobs[num:])
            assert (rest.prompt_logprobs is None) == (whole.prompt_logprobs is None)
            assert alike(rest.prompt_logprobs or (), whole.prompt_logprobs or ())


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2)], ids=str)
def test_a_pair_tells_what_one_gang_tells(model: Path, gang: Gang, sizes: tuple[int, int]) -> None:
    prompts = random_prompts(3, 100, seed=6)
    samplings = [FULL, SamplingSpec(5, num_logprobs=4), SamplingSpec(4, num_logprobs=1, num_prompt_logprobs=1)]
    want = ask(gang, requests_of(prompts, samplings))
    with model_gang(model, sizes[0], name="P") as prefill, model_gang(model, sizes[1], name="D") as decode:
        there, here = {}, {}
        for i, (prompt, spec) in enumerate(zip(prompts, samplings, strict=True)):
            there[f"{i}/p"], here[f"{i}/d"] = Told(), Told()
            prefill.leader.enqueue_request(GenerateRequest(f"{i}/p", prompt, spec, offer=f"t{i}"))
            fetch = Ticket(f"t{i}", prefill.source)
            decode.leader.enqueue_request(GenerateRequest(f"{i}/d", prompt, spec, fetch=fetch))
        gather(prefill, there)
        gather(decode, here)
        prefill.wait_idle()
        decode.wait_idle()
        assert decode.failures() == {}
    for first, told, whole in zip(there.values(), here.values(), want, strict=True):
        assert told.tokens == whole.tokens
        assert alike(told.logprobs, whole.logprobs)
        assert alike(told.prompt_logprobs or (), whole.prompt_logprobs or ())
        assert first.tokens == told.tokens[:1]
        if told.prompt_logprobs is None:
            assert first.logprobs == told.logprobs[:1], "the same whichever is heard first"
            assert told.logits.startswith(first.logits)


@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"])
def test_pauses_and_chunks_tell_nothing_twice(policy: Any) -> None:
    """A small pool: requests are paused and computed anew. Their next tokens are a hash of all that is before."""
    prompts = [[i, *range(i), 7] for i in range(20)]
    spec = SamplingSpec(12, num_logprobs=1, num_prompt_logprobs=1, wants_context_logits=True)
    requests = requests_of(prompts, [spec] * 20)
    knobs: dict[str, Any] = {"num_blocks": 14, "tokens_per_block": 4, "max_seq_len": 64, "max_num_tokens": 9}
    gang, (engine,) = stepped_gang(1, None, policy=policy, **knobs)
    with gang:
        gang.leader.enqueue_requests(requests)
        engine.run_free()  # with all of them there
        answers = {request.request_id: Told() for request in requests}
        gather(gang, answers)
        for prompt, told in zip(prompts, answers.values(), strict=True):
            text = [*prompt, *told.tokens]
            likeliest = [hash_token(text[: at + 1], 1000) for at in range(len(text) - 1)]
            assert told.tokens == likeliest[len(prompt) - 1 :]
            rows = np.frombuffer(told.context_logits, dtype="<f4").reshape(-1, 1000)
            assert rows.argmax(1).tolist() == likeliest[: len(prompt)]
            assert told.prompt_logprobs is not None
            assert [one[1].token_id for one in told.prompt_logprobs] == likeliest[: len(prompt) - 1]
            assert [one[0].token_id for one in told.prompt_logprobs] == prompt[1:]
            assert [one[0] for one in told.logprobs] == [one[1] for one in told.logprobs]
        if policy == "MAX_UTILIZATION":
            assert gang.gauge("num_preemptions_total") > 0
        gang.wait_idle()


def test_logits_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorweave.workers.sampling.logprobs.MAX_CHUNK_BYTES", 10_000)
    with hash_gang(1, None, max_seq_len=64) as gang:
        told = ask(gang, [GenerateRequest("r", list(range(30)), SamplingSpec(1, wants_context_logits=True))])[0]
    assert len(told.context_logits) == 30 * 4000
    assert told.largest_piece == 8000


def test_a_failing_processor_leaves_the_others_and_the_gang_alone() -> None:
    def fails_late(req_id: int, logits: torch.Tensor, token_ids: list[list[int]], stream: Any, client: Any) -> None:
        if len(token_ids[0]) > 5:
            raise KeyError("theirs")

    with hash_gang(1, None) as gang:
        gang.leader.set_logits_processor("late", fails_late)
        bad = GenerateRequest("bad", [1, 2, 3], SamplingSpec(30, logits_processors=("late",)))
        failed, other = ask(gang, [bad, GenerateRequest("good", [1, 2, 3], SamplingSpec(30))])
        assert isinstance(failed.error, RequestRejected)
        assert "KeyError" in failed.error.message
        assert failed.tokens == other.tokens[:3]
        assert other.finish_reason == "length"
        gang.wait_idle()
        gang.leader.set_logits_processor("late", None)
        with pytest.raises(RequestRejected, match="late"):
            gang.leader.enqueue_request(bad)


BIG = ModelInfo("m", 128_000, 100_000, "float32", 32, 8)


@pytest.mark.parametrize(
    ("spec", "num_replayed", "param"),
    [
        (SamplingSpec(1, wants_context_logits=True), 0, "return_context_logits"),
        (SamplingSpec(600, wants_generation_logits=True), 0, "return_generation_logits"),
        (SamplingSpec(1, num_prompt_logprobs=2000), 0, "prompt_logprobs"),
        (SamplingSpec(10), 10, "max_tokens"),
        (SamplingSpec(1, temperature=math.nan), 0, "temperature"),
        (SamplingSpec(1, top_k=-1), 0, "top_k"),
        (SamplingSpec(1, num_logprobs=-1), 0, "logprobs"),
        (SamplingSpec(1, min_tokens=1, stop_token_ids=(128_000,)), 0, "stop_token_ids"),
        (SamplingSpec(1, logit_bias=((-1, 1.0),)), 0, "logit_bias"),
        (SamplingSpec(1, bad_words=((1,), ())), 0, "bad_token_ids"),
        (SamplingSpec(1, bad_words=((1, 128_000),)), 0, "bad_token_ids"),
        (SamplingSpec(1, embedding_bias=bytes(8)), 0, "embedding_bias"),
        (SamplingSpec(10_000), 1000, "prompt"),
    ],
)
def test_what_is_too_much_is_refused_by_name(spec: SamplingSpec, num_replayed: int, param: str) -> None:
    with pytest.raises(RequestRejected) as refused:
        check_fits(GenerateRequest("r", [1] * 1000, spec, num_replayed=num_replayed), BIG)
    assert refused.value.param == param


def test_replayed_output_counts_once() -> None:
    info = replace(BIG, max_seq_len=1010)
    check_fits(GenerateRequest("r", [1] * 1005, SamplingSpec(10), num_replayed=5), info)
    with pytest.raises(RequestRejected):
        check_fits(GenerateRequest("r", [1] * 1005, SamplingSpec(10), num_replayed=4), info)


def test_a_logprob_is_what_it_says() -> None:
    assert Logprob(3, -0.5, 1) == Logprob.from_wire([3, -0.5, 1])
