"""Gangs in simulated time behind a routing policy: what share of requests meets limits of TTFT and ITL.

A step of a gang takes `base_s`, more for each sequence that decodes and for each prompt token; prompts are computed in
order, at most `chunk` tokens a step beside decodes. The policy sees what a router sees: bookings, first tokens, tokens.

These gangs are queues, and a prompt may be computed by another one than its answer. `workers.fakes.simulated_gang` has
the scheduler and KV cache of a real gang instead, and hands nothing over.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tensorweave.cluster.protocol import GenerateRequest, Role, SamplingSpec
from tensorweave.router.dispatch.booking import Booking
from tensorweave.router.dispatch.kv_view import PromptView
from tensorweave.router.dispatch.loads import Loads
from tensorweave.router.dispatch.policy import Options, Route, RoutingPolicy
from tests.router.fake_fleet import FakeLink
from tests.router.serving import model_info

INFO = dataclasses.replace(model_info(), num_blocks=10**6)
TTFT_S, ITL_S = 1.0, 0.03
PROMPTS: dict[int, list[int]] = {}


@dataclass(frozen=True)
class Speed:
    """Of an 8B model on an H100, by default."""

    base_s: float = 0.0052
    per_decode_s: float = 45e-6
    per_token_s: float = 22e-6
    chunk: int = 512
    most_tokens: int = 8192
    handover_s: float = 0.002


@dataclass(frozen=True)
class Arrival:
    at_s: float
    num_prompt: int
    num_answer: int


@dataclass
class Answering:
    """One request, once it was sent somewhere."""

    arrival: Arrival
    booking: Booking
    decoder: Gang
    left: int
    told_s: list[float] = field(default_factory=list)

    def is_good(self, ttft_s: float, itl_s: float) -> bool:
        if not self.told_s or self.told_s[0] - self.arrival.at_s > ttft_s:
            return False
        gaps = sorted(b - a for a, b in itertools.pairwise(self.told_s))
        return not gaps or gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))] <= itl_s


class Gang:
    def __init__(self, world: World, link: FakeLink, speed: Speed) -> None:
        self.world, self.link, self.speed = world, link, speed
        self.waiting: deque[tuple[Answering, int]] = deque()
        self.decoding: list[Answering] = []
        self.is_running = False

    def add_prompt(self, sequence: Answering) -> None:
        self.waiting.append((sequence, sequence.arrival.num_prompt))
        self.begin_step()

    def add_decode(self, sequence: Answering) -> None:
        self.decoding.append(sequence)
        self.begin_step()

    def begin_step(self) -> None:
        if self.is_running or not (self.waiting or self.decoding):
            return
        self.is_running = True
        speed, budget, done = self.speed, self.speed.chunk if self.decoding else self.speed.most_tokens, []
        num_tokens = 0
        while self.waiting and budget:
            sequence, left = self.waiting.popleft()
            took = min(left, budget)
            budget, num_tokens = budget - took, num_tokens + took
            if took < left:
                self.waiting.appendleft((sequence, left - took))
            else:
                done.append(sequence)
        decoding = list(self.decoding)
        step_s = (
            max(speed.base_s, num_tokens * speed.per_token_s)
            if not decoding
            else (speed.base_s + len(decoding) * speed.per_decode_s + num_tokens * speed.per_token_s)
        )
        self.world.after(step_s, lambda: self.end_step(decoding, done))

    def end_step(self, decoding: Sequence[Answering], done: Sequence[Answering]) -> None:
        self.is_running = False
        for sequence in decoding:
            self.world.tell(sequence)
        for sequence in done:
            sequence.booking.prefilled(0, self.world.now_s)
            sequence.told_s.append(self.world.now_s)
            if sequence.left <= 1:
                sequence.booking.close()
            elif sequence.decoder is self:
                sequence.left -= 1
                self.decoding.append(sequence)
            else:
                sequence.left -= 1
                self.world.after(self.speed.handover_s, lambda s=sequence: s.decoder.add_decode(s))
        self.begin_step()


class World:
    """Runs arrivals through a policy over gangs of these roles, until all are answered."""

    def __init__(self, policy: RoutingPolicy, roles: Sequence[Role], speed: Speed) -> None:
        self.policy, self.loads, self.now_s = policy, Loads(), 0.0
        self.gangs = {
            f"g{i}": Gang(self, FakeLink(INFO, gang_id=f"g{i}", role=role, gives_kv=True), speed)
            for i, role in enumerate(roles)
        }
        self.sequences: list[Answering] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), call))

    def run(self, arrivals: Sequence[Arrival]) -> list[Answering]:
        for arrival in arrivals:
            self.after(arrival.at_s, lambda a=arrival: self.arrive(a))
        while self._events:
            self.now_s, _, call = heapq.heappop(self._events)
            call()
        return self.sequences

    def arrive(self, arrival: Arrival) -> None:
        links = [gang.link for gang in self.gangs.values()]
        tokens = PROMPTS.setdefault(arrival.num_prompt, list(range(arrival.num_prompt)))
        prompt = PromptView(GenerateRequest("r", tokens, SamplingSpec(max_tokens=arrival.num_answer)))
        prefill = [link for link in links if link.role != "decode"]
        decode = [link for link in links if link.role != "prefill"]
        route = self.policy.route(Options(prefill, decode, prompt, self.loads))
        booking = Booking(
            self.loads, prefill=route.prefill, decode=route.decode, num_prefill=arrival.num_prompt,
            num_moved=arrival.num_prompt if route.prefill else 0, num_prompt=arrival.num_prompt, num_reserved=128,
            now_s=self.now_s,
        )  # fmt: skip
        sequence = Answering(arrival, booking, self.gangs[route.decode.gang_id], arrival.num_answer)
        self.sequences.append(sequence)
        self.gangs[(route.prefill or route.decode).gang_id].add_prompt(sequence)

    def tell(self, sequence: Answering) -> None:
        if len(sequence.told_s) == 1:
            sequence.booking.handed_over(self.now_s)
        sequence.told_s.append(self.now_s)
        sequence.booking.told(1, self.now_s)
        sequence.left -= 1
        if not sequence.left:
            sequence.decoder.decoding.remove(sequence)
            sequence.booking.close()


class Fixed:
    """A policy that knows nothing but numbers of requests: always hand over to the gangs behind the first, or never."""

    def __init__(self, *, hands_over: bool) -> None:
        self._hands_over = hands_over

    def route(self, options: Options) -> Route:
        def by_load(links: Sequence[FakeLink]) -> FakeLink:
            return min(links, key=lambda link: (options.loads.of(link.gang_id).num_decoding, link.gang_id))

        if not self._hands_over:
            return Route(None, by_load(options.decode))
        first = options.prefill[0]
        return Route(first, by_load([link for link in options.decode if link.gang_id != first.gang_id]))


def mixed_load(
    seed: int, *, chats_per_s: float, burst_every_s: float, burst: int, long: int, duration_s: float
) -> list[Arrival]:
    """Steady chat, and bursts of long prompts with short answers."""
    draw, arrivals, now_s = random.Random(seed), [], 0.0
    while (now_s := now_s + draw.expovariate(chats_per_s)) < duration_s:
        arrivals.append(Arrival(now_s, draw.randint(100, 400), draw.randint(100, 300)))
    now_s = 0.0
    while burst and (now_s := now_s + draw.expovariate(1 / burst_every_s)) < duration_s:
        arrivals += [
            Arrival(now_s + draw.random() * 0.1, draw.randint(long // 2, long), draw.randint(20, 60))
            for _ in range(burst)
        ]
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def goodput(
    policy: RoutingPolicy, roles: Sequence[Role], speed: Speed, arrivals: Sequence[Arrival], learns_s: float
) -> float:
    """Share of the requests after `learns_s` that have their first token within a second, and 99 % of the others within
    30 ms of the one before."""
    sequences = World(policy, roles, speed).run(arrivals)
    counted = [sequence for sequence in sequences if sequence.arrival.at_s >= learns_s]
    return sum(sequence.is_good(TTFT_S, ITL_S) for sequence in counted) / len(counted)
