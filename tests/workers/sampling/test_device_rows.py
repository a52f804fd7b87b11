"""Decoding with `DeviceRows`: padded rows, tokens that stay on the device, results that are read later. On a CPU, and
on a GPU with and without CUDA graphs, where nothing may wait for the device."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from tensorweave.cluster.errors import LogitsNotFinite, RequestRejected
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.kernels.sample.reference import ReferenceSampler
from tensorweave.workers.sampling.decoder import SamplingDecoder
from tensorweave.workers.step.pending import DeviceRows, Ready, StepLogits
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.result import StepResult
from tests.workers.sampling.test_sampling_definitions import random_spec

VOCAB, MAX_ROWS, DUMMY = 24, 32, 40
GREEDY = SamplingSpec(99)
RANDOM = SamplingSpec(99, temperature=0.9, seed=2**63 + 5)
LIMITED = SamplingSpec(99, temperature=1.2, top_k=7, top_p=0.9, seed=3)
PENALISED = SamplingSpec(
    99, temperature=1.0, seed=4, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2
)
TOLD = SamplingSpec(99, temperature=1.0, seed=4, num_logprobs=3, wants_generation_logits=True)


_ON_GPU = [pytest.param(each, marks=pytest.mark.gpu) for each in ("cuda", "cuda with graphs")]


@pytest.fixture(params=["cpu", *_ON_GPU])
def place(request: pytest.FixtureRequest) -> str:
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return str(request.param)


class Device:
    """Buffers of fixed address, as an engine has them; their rows are padded to a multiple of 8."""

    def __init__(self, place: str) -> None:
        self.device = torch.device(place.split()[0])
        self.decoder = SamplingDecoder(device=self.device, keeps_tokens=True)
        self.logits_RV = torch.empty(MAX_ROWS, VOCAB, device=self.device)
        self.slots_R, self.positions_R = torch.zeros(2, MAX_ROWS, dtype=torch.int32, device=self.device)
        self.tokens_S = torch.zeros(DUMMY + 1, dtype=torch.int32, device=self.device)
        if place.endswith("graphs"):
            self.decoder.warm_up([self.step_of(count) for count in range(8, MAX_ROWS + 8, 8)])

    def step_of(self, count: int) -> StepLogits:
        rows = DeviceRows(self.slots_R[:count], self.positions_R[:count], self.tokens_S)
        return StepLogits(self.logits_RV[:count], rows=rows)

    def fill(self, logits: Tensor, requests: Sequence[LlmRequest]) -> tuple[StepLogits, ScheduledBatch]:
        """The slot of a request is its order."""
        count = len(requests)
        padded = -(-count // 8) * 8
        self.logits_RV.fill_(torch.nan)
        self.logits_RV[:count] = logits
        slots = [request.order for request in requests] + [DUMMY] * (padded - count)
        self.slots_R[:padded] = torch.tensor(slots)
        self.positions_R[:count] = torch.tensor([len(request.tokens) for request in requests])
        batch = ScheduledBatch(generation=tuple(StepRow(each, len(each.tokens) - 1, 1, 1) for each in requests))
        return self.step_of(padded), batch

    def decode(self, logits: Tensor, requests: Sequence[LlmRequest], *, may_wait: bool = False) -> StepResult:
        step, batch = self.fill(logits, requests)
        with no_waiting(self.device, may_wait):
            pending = self.decoder.launch(Ready(step), batch)
        return pending.result()


@contextmanager
def no_waiting(device: torch.device, may_wait: bool) -> Iterator[None]:
    if device.type != "cuda" or may_wait:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def request(spec: SamplingSpec, order: int, num_tokens: int = 6) -> LlmRequest:
    tokens = [(order + place) % VOCAB for place in range(num_tokens)]
    return LlmRequest(f"r{order}", order, tokens, 3, spec, state=RequestState.GENERATION)


def plain(logits: Tensor, requests: Sequence[LlmRequest]) -> StepResult:
    """By the reference, on the host, without rows of a device."""
    batch = ScheduledBatch(generation=tuple(StepRow(each, len(each.tokens) - 1, 1, 1) for each in requests))
    return SamplingDecoder(sampler=ReferenceSampler()).decode(logits.clone(), batch)


def tokens_of(result: StepResult) -> list[int | None]:
    return [row[0] if isinstance(row, list) else None for row in result.rows]


KINDS = {
    "greedy": [GREEDY] * 3,
    "random": [RANDOM] * 8,
    "mixed": [GREEDY, RANDOM, GREEDY, LIMITED, RANDOM],
    "penalised": [PENALISED, GREEDY],
    "told": [TOLD, GREEDY, TOLD],
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_reference_and_stay_on_the_device(kind: str, place: str) -> None:
    on = Device(place)
    requests = [request(spec, order) for order, spec in enumerate(KINDS[kind])]
    for step in range(6):
        logits = torch.randn(len(requests), VOCAB, generator=torch.Generator().manual_seed(step)) * 2
        expected = plain(logits, requests)
        on.tokens_S.fill_(7)
        result = on.decode(logits, requests)
        assert tokens_of(result) == tokens_of(expected)
        newest = on.tokens_S.tolist()
        assert newest[: len(requests)] == tokens_of(result)
        assert newest[len(requests) : DUMMY] == [7] * (DUMMY - len(requests))
        assert newest[DUMMY] >= 0
        assert result.extras.keys() == expected.extras.keys()
        for row, (extra,) in result.extras.items():
            (wanted,) = expected.extras[row]
            assert extra.logits == wanted.logits
            assert [each[0] for each in extra.logprobs or ()] == [each[0] for each in wanted.logprobs or ()]
        for row, each in enumerate(requests):
            each.take_tokens(result.rows[row])  # type: ignore[arg-type]


def test_every_parameter_in_batches_that_change(place: str) -> None:
    """Requests come and go between steps; each token is the reference's."""
    rng, on = random.Random(7), Device(place)
    going: list[LlmRequest] = []
    for step in range(30):
        going = [each for each in going if rng.random() > 0.1]
        free = sorted(set(range(DUMMY)) - {each.order for each in going})
        for order in free[: rng.randint(0, 4) if len(going) < MAX_ROWS - 4 else 0]:
            going.append(request(rng.choice([random_spec(rng), GREEDY, RANDOM, LIMITED, TOLD]), order))
        if not going:
            continue
        logits = torch.randn(len(going), VOCAB, generator=torch.Generator().manual_seed(step)) * 2
        expected = tokens_of(plain(logits, going))
        result = on.decode(logits, going)
        assert tokens_of(result) == expected
        for row, each in enumerate(going):
            each.take_tokens(result.rows[row])  # type: ignore[arg-type]


def test_rows_without_a_token_end_their_own_request_and_leave_a_token_to_compute_with(place: str) -> None:
    on = Device(place)
    everything = SamplingSpec(99, bad_words=tuple((token,) for token in range(VOCAB)))
    specs = [GREEDY, RANDOM, PENALISED, everything, LIMITED]
    requests = [request(spec, order) for order, spec in enumerate(specs)]
    logits = torch.randn(len(specs), VOCAB)
    logits[1, 5], logits[2, 0] = torch.nan, torch.inf
    on.tokens_S.fill_(7)
    rows = on.decode(logits, requests).rows
    assert isinstance(rows[1], LogitsNotFinite)
    assert isinstance(rows[2], LogitsNotFinite)
    assert isinstance(rows[3], RequestRejected)
    assert on.tokens_S.tolist()[:5] == [rows[0][0], 0, on.tokens_S[2], 0, rows[4][0]]  # type: ignore[index]
    assert (on.tokens_S >= 0).all()


def test_users_processors_see_the_logits_on_the_device(place: str) -> None:
    on = Device(place)

    def only(req_id: int, logits: Tensor, token_ids: list[list[int]], stream: object, client: object) -> None:
        assert logits.device.type == on.device.type
        logits[..., :9] = -torch.inf
        logits[..., 9] = torch.inf

    on.decoder.processors.set("only", only)
    asking = SamplingSpec(99, temperature=1.0, logits_processors=("only",))
    requests = [request(spec, order) for order, spec in enumerate([asking, GREEDY, asking])]
    logits = torch.randn(3, VOCAB)
    logits[2, 2] = torch.nan
    result = on.decode(logits, requests, may_wait=True)
    assert tokens_of(result) == [9, logits[1].argmax(), None]
    assert isinstance(result.rows[2], LogitsNotFinite)


def test_results_may_be_read_after_later_steps_were_launched(place: str) -> None:
    on = Device(place)
    requests = [request(RANDOM, order) for order in range(4)]
    pending, expected = [], []
    for step in range(5):
        logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(step))
        expected.append(tokens_of(plain(logits, requests)))
        pending.append(on.decoder.launch(Ready(on.fill(logits, requests)[0]), on.fill(logits, requests)[1]))
    assert [tokens_of(each.result()) for each in pending] == expected
    assert tokens_of(pending[0].result()) == expected[0]


UNREAD = [
    PENALISED,
    SamplingSpec(99, presence_penalty=2.0, logit_bias=((3, 5.0), (4, 4.0), (5, 3.0))),
    SamplingSpec(99, temperature=1.5, seed=8, repetition_penalty=2.0, min_tokens=5, stop_token_ids=(1, 2, 3)),
    SamplingSpec(99, frequency_penalty=1.0, embedding_bias=np.linspace(4, 0, VOCAB, dtype="<f4").tobytes()),
]


def test_penalties_and_biases_need_no_tokens_of_launched_steps(place: str) -> None:
    """Five steps are launched before the first result is read, and two requests come again after a pause."""
    on = Device(place)
    requests, twins = ([request(spec, order) for order, spec in enumerate(UNREAD)] for _ in range(2))
    assert not any(on.decoder.reads_tokens(each) for each in requests)
    all_logits = torch.randn(10, len(UNREAD), VOCAB, generator=torch.Generator().manual_seed(1)) * 0.5
    for half in all_logits.split(5):
        pending = []
        for ahead, logits in enumerate(half):
            step, _ = on.fill(logits, requests)
            on.positions_R += ahead
            rows = tuple(StepRow(each, len(each.tokens) - 1 + ahead, 1, 1) for each in requests)
            with no_waiting(on.device, may_wait=False):
                pending.append(on.decoder.launch(Ready(step), ScheduledBatch(generation=rows)))
        for logits, launched in zip(half, pending, strict=True):
            expected = tokens_of(plain(logits, twins))
            assert tokens_of(launched.result()) == expected
            for each, token in zip(twins, expected, strict=True):
                each.take_tokens([token])  # type: ignore[list-item]
        for each, twin in zip(requests, twins, strict=True):
            each.tokens[:] = twin.tokens
        for each in requests[:2]:
            on.decoder.states.free_resources(each)
        on.decode(torch.randn(1, VOCAB), [request(PENALISED, 30)])


def test_what_follows_from_the_tokens_needs_them(place: str) -> None:
    on = Device(place)
    for spec in (
        SamplingSpec(99, no_repeat_ngram_size=2),
        SamplingSpec(99, bad_words=((1, 2),)),
        SamplingSpec(99, temperature=1.0, top_p=0.9, top_p_decay=0.9),
        SamplingSpec(99, logits_processors=("x",)),
    ):
        assert on.decoder.reads_tokens(request(spec, 0))
    host = SamplingDecoder()
    assert host.reads_tokens(request(PENALISED, 0))
    assert not host.reads_tokens(request(SamplingSpec(99, logit_bias=((3, 5.0),)), 1))


def test_more_rows_than_were_warmed_up_for(place: str) -> None:
    on = Device(place)
    on.logits_RV = torch.empty(200, VOCAB, device=on.device)
    on.slots_R, on.positions_R = torch.zeros(2, 200, dtype=torch.int32, device=on.device)
    on.tokens_S = torch.zeros(200, dtype=torch.int32, device=on.device)
    for count in (5, 170, 5):
        requests = [request(spec, order) for order, spec in enumerate(([RANDOM, LIMITED] * count)[:count])]
        logits = torch.randn(count, VOCAB)
        assert tokens_of(on.decode(logits, requests)) == tokens_of(plain(logits, requests))
