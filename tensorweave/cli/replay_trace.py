"""A trace of requests in Mooncake's format, one JSON object per line: `timestamp` (ms), `input_length`,
`output_length`, and `hash_ids`, one per block of 512 prompt tokens: equal ids mean equal prefixes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

BLOCK_TOKENS: Final = 512
_FIRST_TOKEN: Final = 100  # below are special tokens in most vocabularies


@dataclass(frozen=True, slots=True)
class TraceRequest:
    arrival_s: float
    num_prompt: int
    num_output: int
    hash_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Trace:
    """`block_tokens` prompt tokens have one hash id."""

    requests: Sequence[TraceRequest]
    block_tokens: int

    @classmethod
    def read(cls, path: Path, *, limit: int | None = None, speed: float = 1.0, shrink: int = 1) -> Trace:
        """The first `limit` requests, `speed` times as fast, all lengths divided by `shrink`.

        Raises:
            ValueError: A line is not of the format, or the trace is empty.
        """
        requests: list[TraceRequest] = []
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(requests) == limit:
                    break
                requests.append(_request(path, number, line, speed, shrink))
        if not requests:
            raise ValueError(f"{path} has no request")
        return cls(sorted(requests, key=lambda request: request.arrival_s), BLOCK_TOKENS // shrink)

    def ideal_hit_rate(self) -> float:
        """The share of prompt tokens in blocks that an earlier prompt had in the same place: what one cache that never
        forgets would find."""
        seen: set[int] = set()
        num_found = 0
        for request in self.requests:
            known = 0
            for known, hash_id in enumerate(request.hash_ids, 1):
                if hash_id not in seen:
                    known -= 1
                    break
            num_found += min(known * self.block_tokens, request.num_prompt)
            seen.update(request.hash_ids)
        return num_found / sum(request.num_prompt for request in self.requests)

    def plain_prompt(self, request: TraceRequest) -> list[int]:
        """Each hash id as the token of its block: for a simulation, which does not look at tokens."""
        tokens: list[int] = []
        for hash_id in request.hash_ids:
            tokens += [hash_id + 1] * self.block_tokens
        return tokens[: request.num_prompt]

    def prompt(self, request: TraceRequest, vocab_size: int) -> list[int]:
        """Token ids drawn by each hash id."""
        tokens: list[int] = []
        for hash_id in request.hash_ids:
            draw = random.Random(hash_id)
            tokens += draw.choices(range(_FIRST_TOKEN, vocab_size), k=self.block_tokens)
        return tokens[: request.num_prompt]


def _request(path: Path, number: int, line: str, speed: float, shrink: int) -> TraceRequest:
    try:
        fields = json.loads(line)
        num_prompt, num_output = int(fields["input_length"]), int(fields["output_length"])
        hash_ids = tuple(map(int, fields["hash_ids"]))
        arrival_s = float(fields["timestamp"]) / 1e3 / speed
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}:{number}: not a request of a trace ({type(error).__name__}: {error})") from None
    if num_prompt < 1 or num_output < 0 or arrival_s < 0 or len(hash_ids) * BLOCK_TOKENS < num_prompt:
        raise ValueError(f"{path}:{number}: lengths, timestamp or number of hash_ids make no sense")
    return TraceRequest(arrival_s, max(1, num_prompt // shrink), max(1, num_output // shrink), hash_ids)
