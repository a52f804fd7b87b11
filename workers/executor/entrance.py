"""`RequestEntrance`: how a request gets into the step loop's inbox, past what it must wait for: its adapter, then its
grammar. A grammar that is ready may be forgotten again, an adapter that a request waits for is not."""

from __future__ import annotations

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.guide import Guide
from tensorweave.cluster.protocol import GenerateRequest, TokenChunk
from tensorweave.workers.executor.inbox import FollowerInbox, Inbox
from tensorweave.workers.executor.outbox import FollowerOutbox, Outbox
from tensorweave.workers.guided.guides import Guides
from tensorweave.workers.lora.adapters import Adapters
from tensorweave.workers.step.hold import Put
from tensorweave.workers.step.kv_exchange import Transfers


class RequestEntrance:
    """For any thread."""

    def __init__(
        self,
        inbox: Inbox | FollowerInbox,
        outbox: Outbox | FollowerOutbox,
        transfers: Transfers,
        guides: Guides,
        adapters: Adapters,
    ) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._transfers = transfers
        self._guides = guides
        self._adapters = adapters

    def start(self) -> None:
        self._guides.start(self._inbox, self._refuse_guided)
        self._adapters.start(self._inbox, self)

    def put(self, request: GenerateRequest) -> None:
        """Raises TensorweaveError if it is refused."""
        if request.adapter is None:
            self.enter(request, self._inbox.put)
        else:
            self._adapters.admit(request)

    def enter(self, request: GenerateRequest, put: Put) -> None:
        if request.sampling.guide is None:
            put(request, ())
        else:
            self._guides.admit(request, put)

    def refuse(self, hold: bytes, error: TensorweaveError) -> None:
        for request in self._inbox.drop(hold):
            self._end(request, error)

    def refuse_one(self, request: GenerateRequest, error: TensorweaveError) -> None:
        if self._inbox.drop_one(request):
            self._end(request, error)

    def close(self) -> None:
        self._guides.shutdown()
        self._adapters.close()

    def gauges(self) -> dict[str, float]:
        return {**self._guides.gauges(), **self._adapters.gauges()}

    def _refuse_guided(self, guide: Guide, error: TensorweaveError) -> None:
        self.refuse(guide.digest, error)

    def _end(self, request: GenerateRequest, error: TensorweaveError) -> None:
        self._adapters.let_go(request)
        if request.offer is not None:
            self._transfers.decline(request.offer)
        self._outbox.put([TokenChunk(request.request_id, error=error)])
