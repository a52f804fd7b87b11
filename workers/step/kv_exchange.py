"""What the step loop knows of KV transfer: `Transfers`, and its Null object `NoTransfers` for gangs that exchange none.

The loop calls each verb once per step on every rank; bytes move on other threads. What those threads learn (a fetch has
ended, a lease has ended) reaches the loop through rank 0's inbox, so that all ranks act on it in the same step.
`workers.transfer` has the real implementation and its carriers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.protocol import KvEndpoint, KvSource, LinkMeasurement
from tensorweave.workers.step.plan import StepRow
from tensorweave.workers.step.request import LlmRequest, TokenExtras


@dataclass(frozen=True, slots=True)
class KvArrived:
    """A fetch is over on all ranks: KV of the request's first `num_tokens` tokens is verified and in place on each.

    `first_token` is what the prefill gang sampled after the prompt; None where it was lost on the way, and the prompt's
    last token must be computed here. `extras` is what is told with it.
    """

    request_id: str
    num_tokens: int
    first_token: int | None
    extras: TokenExtras | None = None

    def to_wire(self) -> list[Any]:
        extras = None if self.extras is None else self.extras.to_wire()
        return [self.request_id, self.num_tokens, self.first_token, extras]

    @classmethod
    def from_wire(cls, fields: Any) -> KvArrived:
        match fields:
            case [str(request_id), int(num_tokens), int() | None as first_token, extras]:
                return cls(
                    request_id, num_tokens, first_token, None if extras is None else TokenExtras.from_wire(extras)
                )
            case _:
                raise WireError("malformed arrival")


class TransferInbox(Protocol):
    """Where transfer threads report to the step loop: rank 0's `Inbox`."""

    def put_arrived(self, arrived: KvArrived) -> None: ...

    def put_released(self, request_id: str) -> None: ...


class Transfers(Protocol):
    """One rank's side of KV transfer. Except where noted, only the step loop calls, on every rank alike.

    `can_fetch`: whether a request's ticket is of any use here. `endpoint` is where this rank gives KV away, and
    `fingerprint` what a receiver must have in common with it.
    """

    can_fetch: bool
    endpoint: KvEndpoint | None
    fingerprint: dict[str, str]

    def start(self, inbox: TransferInbox) -> None:
        """Before the first step. `inbox` is used by rank 0 alone."""

    def fetch(self, rows: Sequence[StepRow]) -> None:
        """Begin to fetch these requests' KV into the blocks that they now hold; return at once."""

    def offer(self, rows: Sequence[StepRow]) -> None:
        """Offer to other gangs what a settled step has computed of these chunks, as far as their requests are on offer.
        Called after `update_resources`."""

    def follow(self, rows: Sequence[StepRow]) -> None:
        """A step with these chunks was launched: offer what it computes while it does, as far as the engine tells."""

    def keeps(self, request: LlmRequest) -> bool:
        """Close the fetch or the offer of a request that has ended. Return whether its blocks are leased to another
        gang: then the end of the lease comes through the inbox. Else no transfer reads or writes them any more."""

    def release(self, request_id: str) -> LlmRequest | None:
        """End a lease whose end has come through the inbox. Nobody reads the blocks any more; the caller frees them."""

    def drop(self, request: LlmRequest) -> None:
        """Close the fetch of a request whose KV has arrived or which is paused, and withdraw what it has offered: after
        this no transfer reads or writes its blocks."""

    def give_up(self, request_id: str) -> bool:
        """From any thread of rank 0: end a lease early. Return False if there is none."""

    def decline(self, ticket_id: str) -> None:
        """From any thread of rank 0: close the ticket of a request that was refused; nobody then waits for its KV."""

    def wait_released(self, timeout_s: float) -> bool:
        """From any thread: wait until no lease is open. Return whether that happened within `timeout_s`."""

    def measure_link(self, source: KvSource, timeout_s: float) -> LinkMeasurement:
        """From any thread: measure the link from rank 0 of a sending gang to this rank; waits, raises nothing."""

    def gauges(self) -> dict[str, float]:
        """From any thread: counters for metrics."""

    def shutdown(self) -> None:
        """From any thread: close all; nothing touches the cache afterwards."""


class NoTransfers:
    """A gang that exchanges no KV: a ticket is ignored and the prompt is computed here."""

    can_fetch = False

    def __init__(self) -> None:
        self.endpoint: KvEndpoint | None = None
        self.fingerprint: dict[str, str] = {}

    def start(self, inbox: TransferInbox) -> None:
        return None

    def fetch(self, rows: Sequence[StepRow]) -> None:
        assert not rows, "a fetch was scheduled where no KV is exchanged"

    def offer(self, rows: Sequence[StepRow]) -> None:
        return None

    def follow(self, rows: Sequence[StepRow]) -> None:
        return None

    def keeps(self, request: LlmRequest) -> bool:
        return False

    def release(self, request_id: str) -> LlmRequest | None:
        return None

    def drop(self, request: LlmRequest) -> None:
        return None

    def give_up(self, request_id: str) -> bool:
        return False

    def decline(self, ticket_id: str) -> None:
        return None

    def wait_released(self, timeout_s: float) -> bool:
        return True

    def measure_link(self, source: KvSource, timeout_s: float) -> LinkMeasurement:
        return LinkMeasurement(0.0, 0.0, "this gang exchanges no KV")

    def gauges(self) -> dict[str, float]:
        return {}

    def shutdown(self) -> None:
        return None
