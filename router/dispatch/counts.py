"""`DispatchCounts`: what the dispatcher counts for metrics."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field


@dataclass(slots=True)
class DispatchCounts:
    """`retries` by what was lost; `faults` (by reason) caused no replay; `routes` by kind."""

    retries: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    routes: collections.Counter[str] = field(default_factory=collections.Counter)
    num_recovered: int = 0
    num_reattached: int = 0
