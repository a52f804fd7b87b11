"""`RequestTable`: the requests of one executor that have not ended, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator

from tensorweave.workers.step.request import LlmRequest, RequestState

_LAST_STATES = (RequestState.CLOSING, RequestState.DONE)


class RequestTable:
    """`active` are those that need another step, the most urgent first."""

    def __init__(self) -> None:
        self.active: list[LlmRequest] = []
        self.num_arrived = 0
        self._by_id: dict[str, LlmRequest] = {}
        self._has_priorities = False

    def __iter__(self) -> Iterator[LlmRequest]:
        """A copy's: any thread may iterate."""
        return iter(tuple(self._by_id.values()))

    def get(self, request_id: str) -> LlmRequest | None:
        return self._by_id.get(request_id)

    def add(self, request: LlmRequest) -> None:
        self.num_arrived += 1
        self._by_id[request.request_id] = request
        self.active.append(request)
        self._has_priorities |= request.priority != 0

    def sort(self) -> None:
        """Put new requests in their places: by priority, then by arrival."""
        if self._has_priorities:
            self.active.sort(key=lambda request: (-request.priority, request.order))

    def forget(self, request: LlmRequest) -> None:
        """It has ended. It stays active until `prune`."""
        del self._by_id[request.request_id]

    def prune(self) -> None:
        """Take those that need no other step out of `active`."""
        self.active = [request for request in self.active if request.state not in _LAST_STATES]
