"""Each sampling parameter, alone and with others, against a plain numpy implementation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.sampling.decoder import SamplingDecoder
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.result import StepResult
from tests.workers.plain_sampling import chosen

VOCAB = 24
Floats = npt.NDArray[np.float32]


def request(spec: SamplingSpec, prompt: Sequence[int], output: Sequence[int], order: int = 0) -> LlmRequest:
    return LlmRequest(f"r{order}", order, [*prompt, *output], len(prompt), spec, state=RequestState.GENERATION)


def decode(logits: Floats, requests: Sequence[LlmRequest], decoder: SamplingDecoder | None = None) -> StepResult:
    batch = ScheduledBatch(generation=tuple(StepRow(request, len(request.tokens) - 1, 1, 1) for request in requests))
    return (decoder or SamplingDecoder()).decode(torch.from_numpy(logits.copy()), batch)


def tokens_of(result: StepResult) -> list[int | None]:
    """None for a row that has none."""
    return [row[0] if isinstance(row, list) else None for row in result.rows]


# ---- the definitions


def edited(logits: Floats, spec: SamplingSpec, prompt: Sequence[int], output: Sequence[int]) -> Floats:
    """Biases, bans, penalties, each as a loop over the vocabulary."""
    logits = logits.copy()
    tokens = [*prompt, *output]
    for token, bias in spec.logit_bias:
        logits[token] += np.float32(bias)
    if spec.embedding_bias:
        logits += np.frombuffer(spec.embedding_bias, dtype="<f4")
    for token in range(VOCAB):
        if is_banned(token, spec, tokens, len(output)):
            logits[token] = -np.inf
    for token in set(tokens):
        if spec.repetition_penalty != 1.0:
            factor = np.float32(spec.repetition_penalty)
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(output):
        logits[token] -= np.float32(spec.presence_penalty)
        logits[token] -= np.float32(spec.frequency_penalty) * np.float32(output.count(token))
    return logits


def is_banned(token: int, spec: SamplingSpec, tokens: list[int], num_output: int) -> bool:
    longer = [*tokens, token]
    if num_output < spec.min_tokens and token in spec.stop_token_ids:
        return True
    if any(tuple(longer[-len(word) :]) == word for word in spec.bad_words):
        return True
    size = spec.no_repeat_ngram_size
    if size and len(longer) >= size:
        ngrams = [tuple(longer[at : at + size]) for at in range(len(longer) - size + 1)]
        return ngrams[-1] in ngrams[:-1]
    return False


def top_p_now(spec: SamplingSpec, output: Sequence[int]) -> float:
    top_p = spec.top_p
    for token in output:
        decayed = max(top_p * spec.top_p_decay, min(spec.top_p, spec.top_p_min))
        top_p = spec.top_p if token == spec.top_p_reset_ids else decayed
    return top_p


def defined(logits: Floats, spec: SamplingSpec, prompt: Sequence[int], output: Sequence[int]) -> int:
    position = len(prompt) + len(output)
    return chosen(edited(logits, spec, prompt, output), spec, top_p_now(spec, output), position)


# ---- alone


def packed(numbers: Sequence[float]) -> bytes:
    return np.array(numbers, dtype="<f4").tobytes()


RNG = np.random.default_rng(5)
FIELDS: dict[str, list[dict[str, Any]]] = {
    "repetition": [{"repetition_penalty": p} for p in (1.3, 0.7, 5.0)],
    "presence": [{"presence_penalty": p} for p in (0.9, -0.9, 2.0)],
    "frequency": [{"frequency_penalty": p} for p in (0.4, -0.4, 2.0)],
    "ngram": [{"no_repeat_ngram_size": n} for n in (2, 3, 4)],
    "bad": [{"bad_words": ((3,), (5, 6), (1, 2, 3))}, {"bad_words": tuple((t,) for t in range(0, VOCAB, 2))}],
    "bias": [{"logit_bias": ((2, 4.0), (7, -100.0))}, {"logit_bias": ((0, -1.5), (VOCAB - 1, 100.0))}],
    "embedding": [{"embedding_bias": packed(RNG.normal(size=VOCAB) * 2)}],
    "min_tokens": [{"min_tokens": 4, "stop_token_ids": (1, 9, 20)}],
    "decay": [
        {"temperature": 1.0, "top_p": 0.9, "top_p_decay": 0.7, "top_p_min": 0.2},
        {"temperature": 1.0, "top_p": 0.9, "top_p_decay": 0.5, "top_p_reset_ids": 3},
        {"temperature": 1.0, "top_p": 1.0, "top_p_decay": 0.8, "top_p_min": 0.3, "top_p_reset_ids": 4},
    ],
    "temperature": [{"temperature": t} for t in (0.4, 1.0, 2.5)],
    "top_k": [{"temperature": 1.2, "top_k": k} for k in (1, 3, VOCAB + 5)],
    "top_p": [{"temperature": 1.2, "top_p": p} for p in (1e-6, 0.5, 0.95)],
    "min_p": [{"temperature": 1.5, "min_p": p} for p in (0.05, 0.5, 1.0)],
}


def walk(spec: SamplingSpec, prompt: Sequence[int], num_tokens: int, seed: int, told: int = 0) -> list[int]:
    """Generate, checking every token; the first `told` were generated elsewhere."""
    rng = np.random.default_rng(seed)
    going = request(spec, prompt, rng.integers(VOCAB, size=told).tolist())
    for _ in range(num_tokens):
        logits = (rng.normal(size=(1, VOCAB)) * 2).astype(np.float32)
        output = going.tokens[going.prompt_len :]
        token = tokens_of(decode(logits, [going]))[0]
        assert token == defined(logits[0], spec, prompt, output)
        assert token is not None
        going.take_tokens([token])
    return going.tokens


@pytest.mark.parametrize("fields", [f for fields in FIELDS.values() for f in fields], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_parameter_is_what_it_says(fields: dict[str, Any], temperature: float) -> None:
    spec = SamplingSpec(**{"max_tokens": 99, "temperature": temperature, "seed": 11, **fields})
    walk(spec, [1, 2, 3, 1, 2], 25, seed=1)


def random_spec(rng: random.Random) -> SamplingSpec:
    fields: dict[str, Any] = {}
    for name in rng.sample(sorted(FIELDS), rng.randint(1, len(FIELDS))):
        fields |= rng.choice(FIELDS[name])
    return SamplingSpec(**{"max_tokens": 99, "seed": rng.randrange(1 << 40), **fields})


@pytest.mark.parametrize("seed", range(12))
def test_parameters_together_are_what_they_say(seed: int) -> None:
    rng = random.Random(seed)
    walk(random_spec(rng), [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))], 20, seed, told=rng.randint(0, 9))


def test_a_row_is_what_it_is_whatever_stands_beside_it_and_wherever_it_began() -> None:
    """All kinds in one batch, over many steps; and each taken over in the middle by a gang that has not seen it."""
    rng, numbers = random.Random(3), np.random.default_rng(3)
    specs = [random_spec(rng) for _ in range(20)] + [SamplingSpec(99), SamplingSpec(99, temperature=1.0, seed=4)]
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))] for _ in specs]
    going = [request(spec, prompt, (), i) for i, (spec, prompt) in enumerate(zip(specs, prompts, strict=True))]
    for step in range(15):
        logits = (numbers.normal(size=(len(specs), VOCAB)) * 2).astype(np.float32)
        together = tokens_of(decode(logits, going))
        for row, (spec, prompt) in enumerate(zip(specs, prompts, strict=True)):
            output = going[row].tokens[len(prompt) :]
            assert together[row] == defined(logits[row], spec, prompt, output)
            if step % 5 == 4:
                taken_over = request(spec, prompt, output)
                assert tokens_of(decode(logits[row : row + 1], [taken_over])) == [together[row]]
            going[row].take_tokens([together[row]])


# ---- what the parameters are for, seen in the tokens


def generated(spec: SamplingSpec, prompt: Sequence[int], num_tokens: int = 40) -> list[int]:
    return walk(spec, prompt, num_tokens, seed=2)[len(prompt) :]


def test_no_ngram_comes_twice() -> None:
    tokens = [1, 2, 3, *generated(SamplingSpec(99, no_repeat_ngram_size=2), [1, 2, 3])]
    pairs = list(itertools.pairwise(tokens))
    assert len(set(pairs)) == len(pairs)


def test_no_bad_word_comes_to_its_end() -> None:
    words = ((7,), *((a, b) for a in range(VOCAB) for b in range(0, VOCAB, 3)))
    tokens = [5, *generated(SamplingSpec(99, temperature=1.0, seed=1, bad_words=words), [5])]
    assert not set(itertools.pairwise(tokens)) & set(words)
    assert 7 not in tokens


def test_penalties_count_the_output_alone_but_for_repetition() -> None:
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, [3, 4]] = 2.0, 1.5
    for fields, from_prompt in (({"presence_penalty": 1.0}, 3), ({"repetition_penalty": 2.0}, 4)):
        spec = SamplingSpec(99, **fields)
        assert tokens_of(decode(logits, [request(spec, [3, 5], [6])])) == [from_prompt]
        assert tokens_of(decode(logits, [request(spec, [5], [3, 6])])) == [4]


# ---- what cannot be


def test_bans_that_leave_nothing_end_their_own_request() -> None:
    everything = SamplingSpec(99, bad_words=tuple((token,) for token in range(VOCAB)))
    decoded = decode(
        np.zeros((2, VOCAB), dtype=np.float32), [request(everything, [1], [2]), request(SamplingSpec(9), [1], [2])]
    )
    assert tokens_of(decoded) == [None, 0]
    assert isinstance(decoded.rows[0], RequestRejected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_infinite_bias_forces_its_token(temperature: float) -> None:
    spec = SamplingSpec(99, temperature=temperature, logits_processors=("force",))
    decoder = SamplingDecoder()

    def force(req_id: int, logits: torch.Tensor, token_ids: list[list[int]], stream: Any, client: Any) -> None:
        logits[..., 7] = torch.inf

    decoder.processors.set("force", force)
    assert tokens_of(decode(np.zeros((1, VOCAB), dtype=np.float32), [request(spec, [1], [2])], decoder)) == [7]


# ---- users' processors


def test_processors_see_their_request_and_go_first() -> None:
    seen: list[Any] = []

    def shift(req_id: int, logits: torch.Tensor, token_ids: list[list[int]], stream: Any, client: Any) -> None:
        seen.append((req_id, tuple(logits.shape), token_ids, stream, client))
        logits[0, 0, 4] += 5.0

    def double(req_id: int, logits: torch.Tensor, token_ids: list[list[int]], stream: Any, client: Any) -> None:
        logits *= 2

    decoder = SamplingDecoder()
    decoder.processors.set("shift", shift)
    decoder.processors.set("double", double)
    logits = RNG.normal(size=(3, VOCAB)).astype(np.float32)
    spec = SamplingSpec(99, repetition_penalty=1.5, logits_processors=("shift", "double"))
    rows = [request(SamplingSpec(99), [1], [2], 0), request(spec, [4], [3], 1), request(SamplingSpec(99), [1], [2], 2)]
    decoded = decode(logits, rows, decoder)
    changed = logits.copy()
    changed[1, 4] += 5.0
    changed[1] *= 2
    assert tokens_of(decoded) == [
        defined(row, r.sampling, r.tokens[:1], r.tokens[1:]) for row, r in zip(changed, rows, strict=True)
    ]
    assert seen == [(1, (1, 1, VOCAB), [[4, 3]], None, None)]


def test_the_batched_processor_gets_all_that_ask_for_it_at_once() -> None:
    calls: list[Any] = []

    def only(token: int) -> Callable[..., None]:
        def processor(req_ids: Any, logits: Any, token_ids: Any, stream: Any, clients: Any) -> None:
            calls.append((req_ids, [tuple(row.shape) for row in logits], token_ids, clients))
            for row in logits:
                row[..., :token] = -torch.inf
                row[..., token + 1 :] = -torch.inf

        return processor

    decoder = SamplingDecoder()
    decoder.processors.set_batched(only(9))
    asked = SamplingSpec(99, temperature=1.0, uses_batched_processor=True)
    rows = [request(asked, [1], [2], 3), request(SamplingSpec(99), [1], [2], 4), request(asked, [5], [6, 7], 5)]
    logits = np.zeros((3, VOCAB), dtype=np.float32)
    assert tokens_of(decode(logits, rows, decoder)) == [9, 0, 9]
    assert calls == [([3, 5], [(1, 1, VOCAB)] * 2, [[[1, 2]], [[5, 6, 7]]], [None, None])]


@pytest.mark.parametrize("how", ["raises", "nan", "gone", "batched"])
def test_a_processor_that_fails_ends_its_own_requests_alone(how: str) -> None:
    def bad(*arguments: Any) -> None:
        if how == "nan":
            arguments[1][..., 0] = torch.nan
        else:
            raise ZeroDivisionError("theirs")

    decoder = SamplingDecoder()
    spec = SamplingSpec(99, temperature=1.0, num_logprobs=1, logits_processors=("bad",))
    if how == "batched":
        decoder.processors.set_batched(bad)
        spec = SamplingSpec(99, uses_batched_processor=True)
    elif how != "gone":
        decoder.processors.set("bad", bad)
    logits = RNG.normal(size=(2, VOCAB)).astype(np.float32)
    other = request(SamplingSpec(99, repetition_penalty=2.0), [1], [2], 1)
    decoded = decode(logits, [request(spec, [1], [2]), other], decoder)
    assert tokens_of(decoded) == [None, defined(logits[1], other.sampling, [1], [2])]
    error = decoded.rows[0]
    assert isinstance(error, RequestRejected)
    assert error.param == ("apply_batched_logits_processor" if how == "batched" else "logits_processor")


def test_what_is_not_there_is_refused_before_it_enters() -> None:
    processors = SamplingDecoder().processors
    for spec in (SamplingSpec(9, logits_processors=("x",)), SamplingSpec(9, uses_batched_processor=True)):
        with pytest.raises(RequestRejected):
            processors.check(spec)
    processors.set("x", lambda *arguments: None)
    processors.check(SamplingSpec(9, logits_processors=("x",)))
    processors.set("x", None)
    with pytest.raises(RequestRejected, match="'x'"):
        processors.check(SamplingSpec(9, logits_processors=("x",)))


# ---- log-probabilities


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    exact = logits.astype(np.float64)
    exact -= exact.max()
    return exact - np.log(np.exp(exact).sum())


@pytest.mark.parametrize("num_top", [0, 1, 5, VOCAB])
def test_log_probabilities_are_the_models_own(num_top: int) -> None:
    """Before bias, bans, penalties and temperature, whatever stands beside."""
    bans = {"bad_words": ((0,), (1,)), "logit_bias": ((5, 3.0),), "repetition_penalty": 2.0}
    specs = [
        SamplingSpec(9, num_logprobs=num_top),
        SamplingSpec(9, temperature=3.0, seed=8, num_logprobs=num_top, **bans),
        SamplingSpec(9, temperature=1.0),
        SamplingSpec(9, num_logprobs=2, wants_generation_logits=True, **bans),
        SamplingSpec(9, temperature=0.1, wants_generation_logits=True),
    ]
    logits = (RNG.normal(size=(len(specs), VOCAB)) * 3).astype(np.float32)
    decoded = decode(logits, [request(spec, [1, 2], [5], i) for i, spec in enumerate(specs)])
    assert set(decoded.extras) == {0, 1, 3, 4}
    for row, (extras,) in decoded.extras.items():
        spec, exact, token = specs[row], log_softmax(logits[row]), tokens_of(decoded)[row]
        assert extras.logits == (logits[row].tobytes() if spec.wants_generation_logits else b"")
        if spec.num_logprobs is None:
            assert extras.logprobs is None
            continue
        assert extras.logprobs is not None
        own, *top = extras.logprobs
        order = np.argsort(-logits[row], kind="stable")
        assert (own.token_id, own.rank) == (token, int(np.flatnonzero(order == token)[0]) + 1)
        assert [p.token_id for p in top] == order[: spec.num_logprobs].tolist()
        assert [p.rank for p in top] == list(range(1, spec.num_logprobs + 1))
        assert [p.logprob for p in (own, *top)] == pytest.approx([exact[p.token_id] for p in (own, *top)], abs=1e-12)
