"""`Loads`: what this router has sent each gang, and how fast each gang has turned out to be.

The dispatcher opens a `Booking` per attempt and reports tokens to it; policies read the estimates. Speeds are straight
lines (a fixed cost and a cost per token) fitted to observations, with older samples fading.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from tensorweave.cluster.link import GangLink
from tensorweave.cluster.protocol import LinkMeasurement
from tensorweave.router.dispatch.speeds import Mean, Rate, SpeedLine

_PRIOR_AT_SEQUENCES: Final = 64.0
_MAX_GANGS: Final = 4096


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Speeds until some are observed: the prefill of a small GPU, and a hand-over through a network."""

    prefill_fixed_s: float = 0.005
    prefill_per_token_s: float = 1e-4
    handover_fixed_s: float = 0.005
    handover_per_token_s: float = 1e-5
    interval_fixed_s: float = 0.01
    interval_per_sequence_s: float = 1.6e-5
    tokens_per_answer: float = 128.0
    stall_share: float = 0.5


@dataclass(slots=True)
class GangLoad:
    """`queued_tokens` are to be prefilled here; `num_decoding` sequences decode here and hold `kv_tokens`, and the
    `num_streaming` of them that have a token tell more.

    Attributes:
        prefill: seconds until so many tokens of prompts are computed.
        interval: seconds between two tokens of a sequence while no prompt is computed, by how many sequences decode.
        stall_share: which share of the time that a prompt takes is lost to each sequence that decodes beside it.
        slow_interval: the most seconds between two tokens of a sequence while long prompts are computed.
        long_prompts: how often a long prompt is sent here to be computed.
        num_told: tokens that this gang has told.
    """

    prefill: SpeedLine
    interval: SpeedLine
    stall_share: Mean
    slow_interval: Mean
    answer_tokens: Mean
    queued_tokens: int = 0
    num_decoding: int = 0
    kv_tokens: int = 0
    num_prompts: int = 0
    num_long_prompts: int = 0
    num_streaming: int = 0
    num_told: int = 0
    handovers: dict[str, SpeedLine] = field(default_factory=dict)
    long_prompts: Rate = field(default_factory=Rate)

    @property
    def is_idle(self) -> bool:
        return not (self.queued_tokens or self.num_decoding or self.kv_tokens)

    def interval_beside_s(self, num_tokens: int) -> float:
        """The longest time between two tokens while a prompt with so many tokens to compute is computed here."""
        quiet_s = self.interval.seconds(self.num_decoding)
        whole_s = quiet_s + self.prefill.per_token_s * num_tokens
        return min(whole_s, max(self.slow_interval.value, quiet_s))

    def is_hit_share(self, now_s: float) -> float:
        """Which share of the sequences that decode here meets a long prompt before its end."""
        life_s = self.answer_tokens.value * self.interval.seconds(self.num_decoding)
        return 1 - math.exp(-self.long_prompts.per_s(now_s) * life_s)


class Loads:
    def __init__(self, assumed: Assumptions | None = None) -> None:
        self._assumed = assumed or Assumptions()
        self._gangs: dict[str, GangLoad] = {}
        self.now_s = 0.0
        """When the last booking was made."""

    def of(self, gang_id: str) -> GangLoad:
        load = self._gangs.get(gang_id)
        if load is None:
            if len(self._gangs) >= _MAX_GANGS:
                self.keep_only(())
            assumed = self._assumed
            load = self._gangs[gang_id] = GangLoad(
                SpeedLine(assumed.prefill_fixed_s, assumed.prefill_per_token_s),
                SpeedLine(assumed.interval_fixed_s, assumed.interval_per_sequence_s, _PRIOR_AT_SEQUENCES),
                Mean(assumed.stall_share),
                Mean(assumed.interval_fixed_s),
                Mean(assumed.tokens_per_answer),
            )
        return load

    def handover(self, prefill: GangLink, decode: GangLink) -> SpeedLine:
        """Time from the prefill gang's first token to the decode gang's first, by tokens moved. Until one is observed,
        the time that the measured link takes for their bytes; of a link that was not measured, that of the decode
        gang's others."""
        lines = self.of(decode.gang_id).handovers
        line = lines.get(prefill.gang_id)
        if line is None:
            fixed_s, per_token_s = self._assumed.handover_fixed_s, self._assumed.handover_per_token_s
            link, num_bytes = _link_from(prefill, decode), decode.info.kv_bytes_per_token
            if link is not None and num_bytes:
                fixed_s, per_token_s = fixed_s + link.latency_s, num_bytes / link.bytes_per_s
            line = lines[prefill.gang_id] = SpeedLine(fixed_s, per_token_s)
        return line

    def keep_only(self, gang_ids: Collection[str]) -> None:
        """Forget the other gangs, except those that still have a booking."""
        self._gangs = {
            gang_id: load for gang_id, load in self._gangs.items() if gang_id in gang_ids or not load.is_idle
        }
        for load in self._gangs.values():
            load.handovers = {gang_id: line for gang_id, line in load.handovers.items() if gang_id in self._gangs}


def _link_from(prefill: GangLink, decode: GangLink) -> LinkMeasurement | None:
    """The measured link, or the median of those that were measured."""
    if (link := decode.kv_links.get(prefill.gang_id)) is not None:
        return link
    others = sorted(decode.kv_links.values(), key=lambda other: other.bytes_per_s)
    return others[len(others) // 2] if others else None
