"""`Recovery`: what one request remembers of its lost attempts: whom to avoid, how long to wait, and when to give up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tensorweave.cluster.errors import NotReady, Overloaded, TensorweaveError, TransferFailed, WireError, WorkerLost
from tensorweave.cluster.link import GangLink
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.attempt import PrefillRefused
from tensorweave.router.dispatch.policy import Plan

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
        self._num_in_vain = 0
        self._num_sent = 0
        self._num_waits = 0
        self._avoided: set[str] = set()
        self._has_senders = True

    @property
    def ready_timeout_s(self) -> float:
        """How long to wait for a gang: the request's first has a short time, a lost one's replacement a long one."""
        return self._limits.ready_timeout_s if self.error is None else self._limits.recovery_timeout_s

    @property
    def pause_s(self) -> float:
        """Before the next attempt. One gang may die of anything, and the next is asked at once. Where a second one died
        too before another token came, the request itself may be what kills them, or a whole host is gone: in a moment
        we know more of it."""
        return 0.0 if self._num_in_vain < 2 else _PAUSE_S * 2.0 ** (self._num_in_vain - 2)

    def lose(self, plan: Plan | None, error: TensorweaveError, *, num_sent: int) -> None:
        """Book an attempt that was lost when the client had `num_sent` tokens (without a plan: there was no gang to
        try). Raises where another one is not to be tried: what was lost first, rather than that nothing came in its
        place."""
        if plan is None:
            raise self.error or error
        self.error = error
        if isinstance(error, PrefillRefused):
            self._has_senders = False
            return
        self._avoided.add(plan.decode.gang_id)
        if isinstance(error, WorkerLost):
            self._num_in_vain = 1 if num_sent > self._num_sent else self._num_in_vain + 1
            self._num_sent = num_sent
            if self._num_in_vain >= self._limits.max_lost_in_a_row:
                raise WorkerLost(
                    f"{self._num_in_vain} gangs in a row were lost before the next token of this request, which may "
                    f"be what ends them; the last: {error.message}"
                ) from error
        if isinstance(error, Overloaded) and (num_sent or self._limits.waits_for_room):
            is_last = self._num_waits * _MAX_BACKOFF_S > self._limits.recovery_timeout_s
        else:
            self._num_lost += 1
            is_last = self._num_lost >= self._limits.max_attempts
        if is_last:
            raise error

    def left(self, links: Sequence[GangLink]) -> list[GangLink]:
        """Without those that failed this request."""
        return [link for link in links if link.gang_id not in self._avoided]

    def senders_left(self, links: Sequence[GangLink]) -> list[GangLink]:
        """Once a prefill gang has refused the request, none is asked again."""
        return self.left(links) if self._has_senders else []

    def backoff_s(self, *, has_begun: bool) -> float:
        """All gangs have failed this request: how long to wait before they are asked again. Raises the refusal of a
        request that no client has seen a token of."""
        if isinstance(self.error, Overloaded) and not (has_begun or self._limits.waits_for_room):
            raise self.error
        self._avoided.clear()
        self._num_waits += 1
        return min(_FIRST_BACKOFF_S * 2.0 ** (self._num_waits - 1), _MAX_BACKOFF_S)
