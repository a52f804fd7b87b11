"""How long a request's KV blocks are worth keeping in the prefix tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.fields import checked

DEFAULT_RETENTION_PRIORITY: Final = 35


@dataclass(frozen=True, slots=True)
class RetentionRange:
    """Prompt tokens [start, end) keep `priority` (0 to 100) for `duration_s`; None: for ever."""

    start: int
    end: int | None
    priority: int
    duration_s: float | None = None

    @classmethod
    def from_wire(cls, fields: Any) -> RetentionRange:
        start, end, priority, duration_s = fields
        return cls(
            checked(start, "start", int),
            checked(end, "end", int, type(None)),
            checked(priority, "priority", int),
            checked(duration_s, "duration_s", float, int, type(None)),
        )


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a request's KV blocks are worth keeping (`KvCacheRetentionConfig` on the wire)."""

    ranges: tuple[RetentionRange, ...] = ()
    decode_priority: int = DEFAULT_RETENTION_PRIORITY
    decode_duration_s: float | None = None

    def to_wire(self) -> list[Any]:
        ranges = [[r.start, r.end, r.priority, r.duration_s] for r in self.ranges]
        return [ranges, self.decode_priority, self.decode_duration_s]

    @classmethod
    def from_wire(cls, fields: Any) -> Retention:
        try:
            ranges, priority, duration_s = fields
            return cls(
                tuple(RetentionRange.from_wire(r) for r in checked(ranges, "ranges", list, tuple)),
                checked(priority, "priority", int),
                checked(duration_s, "duration_s", float, int, type(None)),
            )
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed retention fields: {error}") from None
