"""Which gangs take a request: a prefill and a decode gang together, or one gang alone.

The dispatcher asks once per attempt. `Joint` estimates the cost of every choice in seconds and takes the least;
`RoundRobin`, `PowerOfTwo` and `LeastLoaded` only rotate or compare numbers of requests. All are deterministic, given
the random generator that is passed in.
"""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from tensorweave.cluster.link import GangLink
from tensorweave.router.dispatch.kv_view import PromptView
from tensorweave.router.dispatch.loads import Loads

PolicyName = Literal["joint", "least_loaded", "power_of_two", "round_robin"]

_SHORTLIST: Final = 8
_MOST_COMPARED: Final = 64
"""A comparison takes 5 µs. The least loaded of 64 is hardly worse than that of all."""
_MAX_SESSIONS: Final = 10_000
_NEAR: Final = 0.9
"""Of a limit of the time between tokens: times vary by so much about the mean that is learnt."""


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Weights of the joint policy.

    Attributes:
        min_prefill_tokens: A prompt with fewer tokens to compute is not handed over.
        stall_weight: What a second of prefill costs each sequence that decodes in the same gang, in seconds. One more
            sequence than there are is counted, since one may arrive.
        decode_s: What one more sequence costs those that decode beside it.
        reserve_tokens: KV space to leave for an answer.
        tie_s: Choices within this of the cheapest are equal: the session's own gang is taken, else they rotate.
        ttft_limit_s: Limit of the time to a first token, if there is one.
        itl_limit_s: Limit of the time between two tokens, if there is one.
        miss_s: What a request that misses a limit costs, in seconds.
    """

    min_prefill_tokens: int = 64
    stall_weight: float = 0.5
    decode_s: float = 0.002
    reserve_tokens: int = 128
    tie_s: float = 0.0005
    ttft_limit_s: float | None = None
    itl_limit_s: float | None = None
    miss_s: float = 3.0


@dataclass(frozen=True, slots=True)
class Route:
    """The gangs of one attempt. `decode` answers the request; `prefill`, if any, computes the prompt for it."""

    prefill: GangLink | None
    decode: GangLink

    @property
    def kind(self) -> Literal["joint", "alone"]:
        return "alone" if self.prefill is None else "joint"


@dataclass(frozen=True, slots=True)
class Options:
    """The gangs to choose from, in a stable order, and the prompt. `decode` is never empty; a gang of role 'both' is in
    both lists."""

    prefill: Sequence[GangLink]
    decode: Sequence[GangLink]
    prompt: PromptView
    loads: Loads
    session: str | None = None
    decode_ids: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decode_ids", frozenset([link.gang_id for link in self.decode]))


class RoutingPolicy(Protocol):
    def route(self, options: Options) -> Route:
        """The gangs to send the request to."""


def fits(prefill: GangLink, decode: GangLink) -> bool:
    """Whether the decode gang can use the prefill gang's KV: their fingerprints say what must be equal."""
    source, own = prefill.kv_source, decode.kv_source
    if source is None or prefill.gang_id == decode.gang_id:
        return False
    return own is None or own.fingerprint == source.fingerprint


class Joint:
    """The choice with the least cost in seconds:

    a gang alone   (queued + uncached) / prefill rate + stall + decode load
    a pair         (queued + uncached) / prefill rate + stall at P + bytes to move / bandwidth + decode load at D

    With limits of TTFT and ITL, each request that probably misses one costs `miss_s` besides. All speeds are learnt
    (`Loads`); `stall_weight` and `decode_s` hold until then.

    A decode gang without KV space for the request is taken only if no gang has it. With more than `_MOST_COMPARED`
    gangs, each decision compares so many of them in turn, and those that hold most of the prompt.
    """

    def __init__(self, settings: PolicySettings | None = None) -> None:
        self.settings = settings or PolicySettings()
        self._sessions: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._rotation = 0

    def route(self, options: Options) -> Route:
        self._rotation += 1
        decode = self._with_room(self._compared(options.decode, options), options)
        costs = [(self.alone_s(link, options), Route(None, link)) for link in decode]
        costs += [(self.pair_s(route, options), route) for route in self._pairs(decode, options)]
        least_s = min(cost_s for cost_s, _ in costs)
        best = [route for cost_s, route in costs if cost_s <= least_s + self.settings.tie_s]
        return self._by_session(best, options.session)

    def alone_s(self, link: GangLink, options: Options) -> float:
        prefill_s = self._prefill_s(link, options, decodes=True)
        return prefill_s + self._decode_s(link, options) + self._misses_s(link, link, options, 0.0, decodes=True)

    def pair_s(self, route: Route, options: Options) -> float:
        assert route.prefill is not None
        decodes = route.prefill.gang_id in options.decode_ids
        prefill_s = self._prefill_s(route.prefill, options, decodes=decodes)
        num_moved = options.prompt.uncached_tokens(route.decode)
        move_s = options.loads.handover(route.prefill, route.decode).seconds(num_moved)
        missed_s = self._misses_s(route.prefill, route.decode, options, move_s, decodes=decodes)
        return prefill_s + move_s + self._decode_s(route.decode, options) + missed_s

    def _prefill_s(self, link: GangLink, options: Options, *, decodes: bool) -> float:
        load = options.loads.of(link.gang_id)
        num_uncached = options.prompt.uncached_tokens(link)
        share = load.stall_share.value if load.stall_share.num_samples else self.settings.stall_weight
        stalled = share * (1 + load.num_decoding) if decodes else 0.0
        stall_s = stalled * load.prefill.per_token_s * num_uncached
        return load.prefill.seconds(load.queued_tokens + num_uncached) + stall_s

    def _misses_s(self, link: GangLink, decode: GangLink, options: Options, move_s: float, *, decodes: bool) -> float:
        """What the limits cost that are probably missed if `link` computes the prompt and `decode` answers: by the
        request itself, and by those that decode at `link`, as far as other prompts do not make them miss anyway."""
        loads, settings, num_missed = options.loads, self.settings, 0.0
        load, answering, now_s = loads.of(link.gang_id), loads.of(decode.gang_id), loads.now_s
        num_uncached = options.prompt.uncached_tokens(link)
        if settings.ttft_limit_s is not None:
            ttft_s = load.prefill.seconds(load.queued_tokens + num_uncached) + move_s
            num_missed += ttft_s > settings.ttft_limit_s
        if settings.itl_limit_s is not None:
            limit_s = settings.itl_limit_s * _NEAR
            if decodes and load.interval_beside_s(num_uncached) > limit_s:
                num_missed += load.num_decoding * (1 - load.is_hit_share(now_s))
            if answering.slow_interval.value > limit_s:
                num_missed += answering.is_hit_share(now_s)
        return settings.miss_s * num_missed

    def _decode_s(self, link: GangLink, options: Options) -> float:
        load = options.loads.of(link.gang_id)
        is_learnt = load.interval.num_samples > 0 and load.answer_tokens.num_samples > 0
        more_s = load.interval.per_token_s * load.answer_tokens.value if is_learnt else self.settings.decode_s
        return load.num_decoding * more_s

    def _compared(self, links: Sequence[GangLink], options: Options) -> Sequence[GangLink]:
        """All, or of many some; in another order each time."""
        if len(links) <= _MOST_COMPARED:
            return _rotated(links, self._rotation)
        some = _rotated(links, self._rotation * _MOST_COMPARED)[:_MOST_COMPARED]
        session = None if options.session is None else self._sessions.get(options.session)
        own = [link for link in links if link.gang_id == session] if session is not None else []
        chosen = {link.gang_id: link for link in (*some, *own, *options.prompt.holders(links, _SHORTLIST))}
        return list(chosen.values())

    def _with_room(self, links: Sequence[GangLink], options: Options) -> Sequence[GangLink]:
        need = options.prompt.num_tokens + self.settings.reserve_tokens

        def has_room(link: GangLink) -> bool:
            load, info = options.loads.of(link.gang_id), link.info
            return load.kv_tokens + need <= info.num_blocks * info.tokens_per_block

        if with_room := list(filter(has_room, links)):
            return with_room
        others = filter(has_room, _rotated(options.decode, self._rotation))
        return list(itertools.islice(others, _MOST_COMPARED)) or links

    def _pairs(self, decode: Sequence[GangLink], options: Options) -> list[Route]:
        """Pairs to consider: with many gangs, only the best of each role."""
        senders = [link for link in self._compared(options.prefill, options) if link.kv_source is not None]
        if len(senders) > _SHORTLIST:
            senders = sorted(senders, key=lambda link: self._prefill_s(link, options, decodes=False))[:_SHORTLIST]
        candidates = [link for link in decode if _is_worth_a_pair(link, options, self.settings)]
        if len(candidates) > _SHORTLIST:
            candidates = sorted(candidates, key=lambda link: self._decode_s(link, options))[:_SHORTLIST]
        return [Route(sender, link) for link in candidates for sender in senders if fits(sender, link)]

    def _by_session(self, best: Sequence[Route], session: str | None) -> Route:
        if session is None:
            return best[0]
        last = self._sessions.get(session)
        route = next((route for route in best if route.decode.gang_id == last), best[0])
        self._sessions[session] = route.decode.gang_id
        self._sessions.move_to_end(session)
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return route


class Picker(Protocol):
    def pick(self, links: Sequence[GangLink]) -> GangLink:
        """One of `links`, which is never empty."""


class Separate:
    """One picker chooses the decode gang; another, unless the prompt is short, chooses among prefill gangs."""

    def __init__(self, decode: Picker, prefill: Picker, settings: PolicySettings | None = None) -> None:
        self._decode, self._prefill = decode, prefill
        self._settings = settings or PolicySettings()

    def route(self, options: Options) -> Route:
        link = self._decode.pick(options.decode)
        senders = [other for other in options.prefill if other.gang_id not in options.decode_ids and fits(other, link)]
        if not senders or not _is_worth_a_pair(link, options, self._settings):
            return Route(None, link)
        return Route(self._prefill.pick(senders), link)


class RoundRobin:
    def __init__(self) -> None:
        self._rotation = 0

    def pick(self, links: Sequence[GangLink]) -> GangLink:
        self._rotation += 1
        return links[self._rotation % len(links)]


class PowerOfTwo:
    """The less loaded of two drawn at random: near the optimum if many routers share the gangs (Mitzenmacher 2001)."""

    def __init__(self, draw: random.Random | None = None) -> None:
        self._draw = draw or random.Random()

    def pick(self, links: Sequence[GangLink]) -> GangLink:
        if len(links) == 1:
            return links[0]
        first, second = self._draw.sample(range(len(links)), 2)
        return min(links[first], links[second], key=lambda link: link.num_inflight)


class LeastLoaded:
    """Ties rotate, so that an idle fleet is used evenly."""

    def __init__(self) -> None:
        self._rotation = 0

    def pick(self, links: Sequence[GangLink]) -> GangLink:
        self._rotation += 1
        return min(_rotated(links, self._rotation), key=lambda link: link.num_inflight)


def build_policy(
    name: PolicyName, settings: PolicySettings | None = None, draw: random.Random | None = None
) -> RoutingPolicy:
    match name:
        case "joint":
            return Joint(settings)
        case "least_loaded":
            return Separate(LeastLoaded(), LeastLoaded(), settings)
        case "power_of_two":
            return Separate(PowerOfTwo(draw), PowerOfTwo(draw), settings)
        case "round_robin":
            return Separate(RoundRobin(), RoundRobin(), settings)


def _is_worth_a_pair(decode: GangLink, options: Options, settings: PolicySettings) -> bool:
    return options.prompt.uncached_tokens(decode) >= settings.min_prefill_tokens


def _rotated(links: Sequence[GangLink], rotation: int) -> Sequence[GangLink]:
    start = rotation % len(links) if links else 0
    return [*links[start:], *links[:start]]
