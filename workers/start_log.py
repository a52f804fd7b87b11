"""`StartLog`: what a rank does while it starts: each part is reported as it begins and logged when it is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger(__name__)


class StartLog:
    """One start. `durations` has the seconds of each part that is over.

    Args:
        on_phase: told what is being done, in a few words, and how far it is.
        shows_bars: also show a progress bar on stderr for each part that tells how far it is.
    """

    def __init__(
        self,
        on_phase: Callable[[str], object] = lambda phase: None,
        *,
        shows_bars: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.durations: dict[str, float] = {}
        self._on_phase = on_phase
        self._shows_bars = shows_bars
        self._clock = clock

    @contextmanager
    def part(self, name: str) -> Iterator[Callable[[float], None]]:
        """Time a part of the start. What it yields is called with the share of the part that is done, from 0 to 1."""
        self._on_phase(name)
        began_s = self._clock()
        with tqdm(total=100, desc=name, unit="%", disable=not self._shows_bars, leave=False) as bar:

            def tell(share: float) -> None:
                self._on_phase(f"{name} ({share:.0%})")
                bar.update(round(100 * share) - bar.n)

            yield tell
        self.durations[name] = self._clock() - began_s
        logger.info("%s took %.2f s", name, self.durations[name])
