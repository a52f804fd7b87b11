"""What a client is told of one request, whatever its attempts say: each token once, with what belongs to it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Sequence

import pytest

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.protocol import GenerateRequest, KvSource, Logprob, SamplingSpec, Ticket, TokenChunk
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.dispatch.policy import PolicySettings, build_policy
from tensorweave.router.dispatch.transcript import Diverged, Transcript
from tensorweave.router.text.generation import Job, TextDelta, TokensOnly, generate_text
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tests.router.fake_fleet import FakeFleet, FakeLink, Fault
from tests.router.serving import model_info

PROMPT = [5, 6, 7]
TOLD = SamplingSpec(
    8, min_tokens=2, seed=3, num_logprobs=1, num_prompt_logprobs=0, wants_context_logits=True,
    wants_generation_logits=True, repetition_penalty=1.5,
)  # fmt: skip
REQUEST = GenerateRequest("r", PROMPT, TOLD, fetch=Ticket("t", KvSource("g", (), {}, "")))


def logprob(token: int) -> tuple[Logprob, ...]:
    return (Logprob(token, -float(token), 1), Logprob(token + 1, -9.0, 2))


def row(token: int) -> bytes:
    return token.to_bytes(8, "little")


def chunk(start: int, tokens: Sequence[int], finish: str | None = None) -> TokenChunk:
    """As a gang tells tokens; with the first one's chunk, the prompt's."""
    prompt = [logprob(token) for token in PROMPT[1:]]
    return TokenChunk(
        "r/d1",
        tokens,
        finish,  # type: ignore[arg-type]
        start=start,
        logprobs=[logprob(token) for token in tokens],
        prompt_logprobs=prompt,
        logits=b"".join(map(row, tokens)),
    )


def test_what_is_told_is_told_once_and_with_its_token() -> None:
    transcript = Transcript(REQUEST)
    assert transcript.begin(None).num_replayed == 0
    first = transcript.take(chunk(0, [10]))
    assert first is not None
    assert (first.prompt_logprobs, first.logprobs, first.logits) == ([logprob(6), logprob(7)], [logprob(10)], row(10))
    assert transcript.take(chunk(0, [10])) is None, "the other gang of a pair says it too"
    more = transcript.take(chunk(0, [10, 11, 12]))
    assert more is not None
    assert (more.start, more.token_ids, more.prompt_logprobs) == (1, [11, 12], None)
    assert (more.logprobs, more.logits) == ([logprob(11), logprob(12)], row(11) + row(12))


def test_a_replay_says_what_was_generated_and_changes_no_setting() -> None:
    transcript = Transcript(REQUEST)
    transcript.begin(None)
    transcript.take(chunk(0, [10, 11]))
    again = transcript.begin(2.0)
    assert (again.prompt_token_ids, again.num_replayed, again.fetch) == ([*PROMPT, 10, 11], 2, None)
    assert again.sampling == TOLD
    rest = transcript.take(chunk(2, [12], "stop"))
    assert rest is not None
    assert (rest.start, rest.token_ids, rest.logprobs, rest.prompt_logprobs) == (2, [12], [logprob(12)], None)
    assert transcript.is_over


@pytest.mark.parametrize(
    "wrong", [chunk(3, [12]), chunk(1, [10]), chunk(0, [10], "length")], ids=["gap", "other", "short"]
)
def test_an_attempt_that_does_not_fit_is_noticed(wrong: TokenChunk) -> None:
    transcript = Transcript(REQUEST)
    transcript.begin(None)
    transcript.take(chunk(0, [10, 11]))
    with pytest.raises(Diverged):
        transcript.take(wrong)


def test_each_attempt_tells_the_prompts_logits_from_the_start_and_the_client_hears_them_once() -> None:
    rows = b"".join(map(row, range(6)))
    transcript = Transcript(REQUEST)
    told = b""
    for cuts in ((0, 8, 24), (0, 16, 32), (0, 40, 48)):
        transcript.begin(None)
        for start, stop in itertools.pairwise(cuts):
            chunk = transcript.take(TokenChunk("r/d1", start=0, context_logits=rows[start:stop]))
            told += b"" if chunk is None else chunk.context_logits
    assert told == rows


class Teller(FakeLink):
    """Tells log-probabilities with its tokens."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        async for said in super().generate(request):
            yield chunk(said.start, said.token_ids, said.finish_reason)


def test_log_probabilities_go_on_over_a_lost_gang_and_reach_the_text() -> None:
    async def run() -> list[TextDelta]:
        links = [Teller(model_info(), gang_id=name, step_s=0.01) for name in "ab"]
        for link in links:
            link.faults = [Fault("error", after=3, closes=False, error=WorkerLost("gone"))]
        links[1].faults = []
        request = GenerateRequest("r", PROMPT, TOLD)
        job = Job(0, request, TokensOnly(), frozenset())
        return [delta async for delta in generate_text(Dispatcher(FakeFleet(*links), build_policy("round_robin")), job)]

    deltas = run_stepped(run())
    assert [p for delta in deltas for p in delta.logprobs] == [logprob(t) for delta in deltas for t in delta.token_ids]
    assert b"".join(delta.logits for delta in deltas) == b"".join(row(t) for delta in deltas for t in delta.token_ids)
    assert [delta.prompt_logprobs is not None for delta in deltas] == [True] + [False] * 7


def test_a_prompt_that_is_told_of_is_computed_where_it_is_answered() -> None:
    async def run(sampling: SamplingSpec) -> int:
        info = model_info()
        sender, answerer = FakeLink(info, gang_id="p", role="prefill"), FakeLink(info, gang_id="d", role="decode")
        dispatcher = Dispatcher(
            FakeFleet(sender, answerer), build_policy("joint", PolicySettings(min_prefill_tokens=1))
        )
        async for _ in dispatcher.generate(GenerateRequest("r", list(range(400)), sampling)):
            pass
        return len(sender.requests)

    assert run_stepped(run(SamplingSpec(4, num_logprobs=1))) == 1
    assert run_stepped(run(SamplingSpec(4, num_prompt_logprobs=1))) == 0
    assert run_stepped(run(SamplingSpec(4, wants_context_logits=True))) == 0


def test_a_first_phase_token_waits_for_its_log_probability() -> None:
    """A generation phase by hand knows the first token, but not what else is asked of it; its gang does."""

    async def run(sampling: SamplingSpec) -> list[TokenChunk]:
        link = Teller(model_info(), gang_id="d", step_s=0.01, script=[9, 8, 7, 6])
        request = GenerateRequest("r", PROMPT, sampling, fetch=REQUEST.fetch)
        return [c async for c in Dispatcher(FakeFleet(link)).generate(request, first_tokens=[9])]

    plain = run_stepped(run(SamplingSpec(3)))
    assert (plain[0].token_ids, plain[0].logprobs) == ([9], ())
    told = run_stepped(run(SamplingSpec(3, num_logprobs=1)))
    assert [list(c.token_ids) for c in told] == [[9], [8], [7]]
    assert [list(c.logprobs) for c in told] == [[logprob(9)], [logprob(8)], [logprob(7)]]


def test_a_first_phase_tells_all_of_the_prompts_logits() -> None:
    class Rows(Teller):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
            yield TokenChunk(request.request_id, context_logits=row(1))
            yield TokenChunk(request.request_id, context_logits=row(2))
            async for said in super().generate(request):
                yield said

    async def run() -> TokenChunk:
        link = Rows(model_info(), gang_id="p", role="prefill", script=[9])
        handoff = await Dispatcher(FakeFleet(link)).prefill(GenerateRequest("r", PROMPT, TOLD))
        assert handoff.ticket is not None
        return handoff.chunk

    first = run_stepped(run())
    assert (first.context_logits, list(first.logprobs)) == (row(1) + row(2), [logprob(9)])
