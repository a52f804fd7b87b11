"""Whole requests, as a router sends them, with gangs of this process: one that does all, or a prefill and a decode
gang. What comes of each request is gathered so that two ways can be compared."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from unittest.mock import patch

from tensorweave.cluster.fleet import StaticFleet
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenLogprobs
from tensorweave.router.dispatch import attempt
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.dispatch.policy import Options, Route
from tensorweave.router.sampling.resolution import nth_seed
from tensorweave.router.text.detokenize import IncrementalDetokenizer
from tensorweave.router.text.generation import Job, generate_text
from tensorweave.router.text.tokens import Tokenizer
from tensorweave.workers.executor.local import LocalLink
from tests.workers.transfer_drive import Gang

_AT_ONCE = 8
_DEADLINE_S = 3600.0
_BLOCK_TOKENS = 32
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Ask:
    """A user's request: `n` sequences of one prompt, which no other request shares a cache with."""

    name: str
    prompt: list[int]
    sampling: SamplingSpec
    n: int = 1
    stop: tuple[str, ...] = ()


@dataclass
class Told:
    """One sequence, as the client receives it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached: int = 0


def make_asks(count: int, seed: int, vocab_size: int, longest: int, stops: Sequence[str], most: int = 16) -> list[Ask]:
    """Prompt lengths from 1 to `longest`, as many of each order of magnitude."""
    rng = random.Random(seed)
    asks = []
    for i in range(count):
        length = {0: 1, 1: longest}.get(i, round(longest ** rng.random()))
        sampling = SamplingSpec(
            max_tokens=rng.randint(1, most),
            temperature=rng.choice([0.0, 0.0, 0.7, 1.2]),
            top_k=rng.choice([0, 0, 20]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.05]),
            seed=rng.randrange(1 << 40),
            num_logprobs=rng.choice([None, 0, 3]),
            num_prompt_logprobs=1 if i % 8 == 5 else None,
            stop_token_ids=tuple(rng.sample(range(vocab_size), 5)) if rng.random() < 0.2 else (),
        )
        stop = tuple(rng.sample(stops, min(8, len(stops)))) if rng.random() < 0.4 else ()
        prompt = [rng.randrange(3, vocab_size) for _ in range(length)]
        asks.append(Ask(f"ask{i}", prompt, sampling, rng.choice([1, 1, 2, 3]), stop))
    return asks


class _Port(LocalLink):
    def __init__(self, gang: Gang, gives_kv: bool) -> None:
        super().__init__(gang.leader, gang.source if gives_kv else None)
        self.gang_id = gang.name


class _AlwaysTogether:
    """A policy that prefills every prompt at another gang, however short."""

    def route(self, options: Options) -> Route:
        return Route(options.prefill[0] if options.prefill else None, options.decode[0])


def run(asks: Sequence[Ask], tokenizer: Tokenizer, decode: Gang, prefill: Gang | None = None) -> dict[str, Told]:
    """The results of every sequence, by "name/index". Sequences of one request follow each other, so that what the
    later ones find in the caches does not hang on time; nor does whether the prefill gang's share of it is counted."""

    async def all_of_them() -> dict[str, Told]:
        decoding, prefilling = [_Port(decode, False)], [] if prefill is None else [_Port(prefill, True)]
        fleet = StaticFleet({"decode": decoding, "prefill": prefilling})
        dispatcher = Dispatcher(fleet, _AlwaysTogether(), Limits(default_deadline_s=None))
        told: dict[str, Told] = {}
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(ask: Ask) -> None:
            async with places:
                for index in range(ask.n):
                    told[f"{ask.name}/{index}"] = await _tell(dispatcher, tokenizer, ask, index)
                    await _settle(ask, decode, prefill)

        try:
            async with asyncio.timeout(_DEADLINE_S), asyncio.TaskGroup() as group:
                for ask in asks:
                    group.create_task(one(ask))
        finally:
            await fleet.close()
            for port in (*decoding, *prefilling):
                await asyncio.to_thread(port.join, 10.0)
        assert not dispatcher.counts.retries
        assert not dispatcher.counts.faults
        return told

    with patch.object(attempt, "TWIN_WAIT_S", _DEADLINE_S):
        return asyncio.run(all_of_them())


async def _tell(dispatcher: Dispatcher, tokenizer: Tokenizer, ask: Ask, index: int) -> Told:
    values = {name: getattr(ask.sampling, name) for name in SamplingSpec.__slots__}
    sampling = SamplingSpec(**{**values, "seed": nth_seed(ask.sampling.seed, index)})
    request = GenerateRequest(f"{ask.name}-{index}", ask.prompt, sampling, cache_salt=ask.name)
    job = Job(index, request, IncrementalDetokenizer(tokenizer, stop=ask.stop), frozenset())
    told = Told()
    async with aclosing(generate_text(dispatcher, job)) as deltas:
        async for delta in deltas:
            told.text += delta.text
            told.token_ids += delta.token_ids
            told.logprobs += delta.logprobs
            told.prompt_logprobs += delta.prompt_logprobs or []
            told.num_cached = delta.num_cached_tokens
            told.finish_reason, told.stop_reason = delta.finish_reason, delta.stop_reason
    return told


async def _settle(ask: Ask, *gangs: Gang | None) -> None:
    """A sequence that a stop string has ended is cancelled. The next one must find its blocks in the tree."""
    for gang in gangs:
        while gang is not None and any(r.request_id.startswith(f"{ask.name}-") for r in gang.leader._loop.requests):
            await asyncio.sleep(0.001)


def differences(want: dict[str, Told], got: dict[str, Told], tolerance: float = TOLERANCE) -> list[str]:
    """Describe the differences; log-probabilities are compared with a tolerance.

    A sequence that a stop string has ended is cancelled while its gang goes on: whether it had come to an end of its
    own by then decides whether the last, partly filled block is kept. So of such requests cached tokens may differ by
    less than a block.
    """
    is_cut = {name.split("/")[0] for name, told in want.items() if isinstance(told.stop_reason, str)}
    wrong = [f"{name} is there once" for name in want.keys() ^ got.keys()]
    for name in want.keys() & got.keys():
        one, other = want[name], got[name]
        fields = ("text", "token_ids", "finish_reason", "stop_reason")
        pairs = {what: (getattr(one, what), getattr(other, what)) for what in fields}
        wrong += [f"{name}: {what}: {a!r}, then {b!r}" for what, (a, b) in pairs.items() if a != b]
        slack = _BLOCK_TOKENS - 1 if name.split("/")[0] in is_cut else 0
        if abs(one.num_cached - other.num_cached) > slack:
            wrong.append(f"{name}: cached tokens: {one.num_cached}, then {other.num_cached}")
        for what in ("logprobs", "prompt_logprobs"):
            wrong += [
                f"{name}: {what}: {text}" for text in _of_logprobs(getattr(one, what), getattr(other, what), tolerance)
            ]
    return sorted(wrong)


def _of_logprobs(one: Sequence[TokenLogprobs], other: Sequence[TokenLogprobs], tolerance: float) -> list[str]:
    if [len(token) for token in one] != [len(token) for token in other]:
        return [f"{len(one)} tokens, then {len(other)}, or not as many likeliest ones"]
    wrong = []
    for at, (these, those) in enumerate(zip(one, other, strict=True)):
        for place, (a, b) in enumerate(zip(these, those, strict=True)):
            # Far down the list, neighbours are closer than two orders of summation.
            is_same = abs(a.logprob - b.logprob) <= tolerance and abs(a.rank - b.rank) <= a.rank // 50
            is_own = place == 0
            if not is_same or (is_own and a.token_id != b.token_id):
                wrong.append(f"token {at}, place {place}: {a}, then {b}")
    return wrong
