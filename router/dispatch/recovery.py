"""`Recovery`: what one request remembers of its lost attempts: gangs to avoid, how long to wait, when to give up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from tensorweave.cluster.errors import NotReady, Overloaded, TensorweaveError, TransferFailed, WireError, WorkerLost
from tensorweave.cluster.fleet import Fleet
from tensorweave.cluster.link import GangLink
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.attempt import PrefillRefused
from tensorweave.router.dispatch.policy import Route

RECOVERABLE: Final = (WorkerLost, NotReady, TransferFailed, WireError, Overloaded, PrefillRefused)

_FIRST_BACKOFF_S: Final = 0.05
_MAX_BACKOFF_S: Final = 2.0
_PAUSE_S: Final = 0.5


class Recovery:
    def __init__(self, limits: Limits) -> None:
        self.num_attempts = 0
        self.error: TensorweaveError | None = None
        """Why the last attempt was lost."""
        self._limits = limits
        self._num_lost = 0
        self._num_lost_in_a_row = 0
        self._num_sent = 0
        self._num_waits = 0
        self._avoided: set[str] = set()
        self._has_senders = True

    def lose(self, route: Route | None, error: TensorweaveError, *, num_sent: int) -> None:
        """Record an attempt that was lost after the client had received `num_sent` tokens; `route` is None if there was
        no gang to try. Raises if no other attempt is to be made: the first cause, rather than that nothing replaced
        it."""
        if route is None:
            raise self.error or error
        self.error = error
        if isinstance(error, PrefillRefused):
            self._has_senders = False
            return
        self._avoided.add(route.decode.gang_id)
        if isinstance(error, WorkerLost):
            self._num_lost_in_a_row = 1 if num_sent > self._num_sent else self._num_lost_in_a_row + 1
            self._num_sent = num_sent
            if self._num_lost_in_a_row >= self._limits.max_lost_in_a_row:
                raise WorkerLost(
                    f"{self._num_lost_in_a_row} gangs in a row were lost before the next token of this request, which "
                    f"may be what ends them; the last: {error.message}"
                ) from error
        if isinstance(error, Overloaded) and (num_sent or self._limits.waits_for_room):
            is_last = self._num_waits * _MAX_BACKOFF_S > self._limits.recovery_timeout_s
        else:
            self._num_lost += 1
            is_last = self._num_lost >= self._limits.max_attempts
        if is_last:
            raise error

    async def wait_for_gangs(self, fleet: Fleet, *, has_begun: bool) -> tuple[list[GangLink], list[GangLink]]:
        """Wait until some gang can answer. Return those that may prefill and those that may answer.

        If no decode gang is open at all, prefill gangs answer in their place.
        """
        if self._pause_s:
            await asyncio.sleep(self._pause_s)
        while True:
            senders, decode = fleet.links("prefill"), fleet.links("decode")
            if usable := self.left(decode):
                usable_senders = self.left(senders) if self._has_senders else []
                return responsive(usable_senders), responsive(usable) or usable
            if not decode and (usable := self.left(senders)):
                return [], responsive(usable) or usable
            if decode or senders:
                await asyncio.sleep(self.start_over(has_begun=has_begun))
            else:
                await fleet.wait_link(self._ready_timeout_s)

    async def wait_for_embedders(self, fleet: Fleet) -> list[GangLink]:
        """Wait until a gang of role 'embed' can answer, and return those that may."""
        if self._pause_s:
            await asyncio.sleep(self._pause_s)
        while True:
            links = fleet.links("embed")
            if usable := self.left(links):
                return responsive(usable) or usable
            if links:
                await asyncio.sleep(self.start_over(has_begun=False))
            else:
                await fleet.wait_link(self._ready_timeout_s, "embed")

    def left(self, links: Sequence[GangLink]) -> list[GangLink]:
        """Without those that failed this request."""
        return [link for link in links if link.gang_id not in self._avoided]

    @property
    def _ready_timeout_s(self) -> float:
        """How long to wait for a gang: for the first briefly, for the replacement of a lost one much longer."""
        return self._limits.ready_timeout_s if self.error is None else self._limits.recovery_timeout_s

    @property
    def _pause_s(self) -> float:
        """Before the next attempt. After one loss the next gang is asked at once. If a second gang is lost before
        another token arrives, this request may be what kills them, or a whole host is gone: wait for more to show."""
        return 0.0 if self._num_lost_in_a_row < 2 else _PAUSE_S * 2.0 ** (self._num_lost_in_a_row - 2)

    def start_over(self, *, has_begun: bool) -> float:
        """All gangs have failed this request: allow them all again and return how long to wait before. Raises the
        refusal of a request of which the client has no token yet."""
        if isinstance(self.error, Overloaded) and not (has_begun or self._limits.waits_for_room):
            raise self.error
        self._avoided.clear()
        self._num_waits += 1
        return min(_FIRST_BACKOFF_S * 2.0 ** (self._num_waits - 1), _MAX_BACKOFF_S)


def responsive(links: Sequence[GangLink]) -> list[GangLink]:
    """Without gangs that have gone silent: they keep the requests they have, and get no new ones."""
    return [link for link in links if not link.is_quiet]
