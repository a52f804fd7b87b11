"""`RequestTable`: a leader's requests, which client each is attached to, and the answers that can be asked for again.

    running, attached ──its client cancels──▶ cancelled ──last chunk──▶ removed
        │    │ ──its connection breaks──▶ running, detached ──grace_s pass──▶ cancelled
        │    └◀────────── attach ────────────────┘ │
        │                                          └─last chunk─▶ kept, detached ──grace_s pass──▶ removed
        └─last chunk─▶ kept, attached ──its connection breaks────────▶┘ (with grace_s 0: removed)
                            └──its client cancels: it has received the answer──▶ removed

Only a detached request can be found and attached to, so an answer never goes to two clients, whatever ids they give
their requests. Used on the leader's loop thread only.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from tensorweave.cluster.protocol import GenerateRequest, TokenChunk

MAX_GRACE_S: Final = 60.0
MAX_KEPT_TOKENS: Final = 1 << 20
"""Of prompts and answers that are kept (see `ServedRequest.num_tokens`); the oldest are removed first."""

C = TypeVar("C")


@dataclass(eq=False, slots=True)
class ServedRequest(Generic[C]):
    """A request, and its `client`, which is None once its connection has broken. `chunks` are those so far, if the
    answer can be replayed.

    `can_replay` is False for answers with logits, which are not kept. It is also False if another attempt generated
    the beginning, whose token ids alone are known here, and the client asked for more than these.
    """

    request: GenerateRequest
    client: C | None
    chunks: list[TokenChunk] = field(default_factory=list)
    is_cancelled: bool = False
    is_over: bool = False
    timer: asyncio.TimerHandle | None = None
    can_replay: bool = field(init=False)

    def __post_init__(self) -> None:
        request, sampling = self.request, self.request.sampling
        has_logits = sampling.wants_context_logits or sampling.wants_generation_logits
        lacks_extras = request.num_replayed > 0 and (sampling.wants_extras or sampling.needs_prompt_rows)
        self.can_replay = self.grace_s > 0 and request.offer is None and not has_logits and not lacks_extras

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def grace_s(self) -> float:
        return min(self.request.grace_s, MAX_GRACE_S)

    @property
    def replayed_tokens(self) -> list[int]:
        """The beginning of the answer, if another attempt has generated it."""
        request = self.request
        return list(request.prompt_token_ids[len(request.prompt_token_ids) - request.num_replayed :])

    @property
    def is_recorded(self) -> bool:
        return self.can_replay and not self.is_cancelled

    @property
    def can_attach(self) -> bool:
        return self.is_recorded and self.client is None

    @property
    def num_tokens(self) -> int:
        """The memory that it takes, in tokens of prompt and answer; a log-probability counts as one."""
        return len(self.request.prompt_token_ids) + sum(len(c.token_ids) + c.num_logprobs for c in self.chunks)


def client_request_id(request_id: str) -> str:
    """The id of the client's request that an attempt belongs to; attempts are named "id/x"."""
    return request_id.rpartition("/")[0] or request_id


class RequestTable(Generic[C]):
    """`cancel` cancels a request at the executor; its last chunk follows."""

    def __init__(self, cancel: Callable[[str], object], *, max_kept_tokens: int = MAX_KEPT_TOKENS) -> None:
        self._cancel_request = cancel
        self._max_kept_tokens = max_kept_tokens
        self._running: dict[str, ServedRequest[C]] = {}
        self._kept: collections.OrderedDict[str, ServedRequest[C]] = collections.OrderedDict()
        self._num_kept_tokens = 0

    @property
    def running_ids(self) -> list[str]:
        return list(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def is_running(self, request_id: str) -> bool:
        return request_id in self._running

    def add(self, request: GenerateRequest, client: C) -> None:
        assert request.request_id not in self._running
        self._remove_kept(request.request_id)
        self._running[request.request_id] = ServedRequest(request, client)

    def record(self, chunk: TokenChunk) -> C | None:
        """Record a chunk of an answer; return the client that gets it."""
        served = self._running.get(chunk.request_id)
        if served is None:
            return None
        if served.is_recorded:
            served.chunks.append(chunk)
        if chunk.is_last:
            self._end(served, chunk)
        return served.client

    def cancel(self, request_id: str, client: C) -> bool:
        """The client needs no more of its request, or has received all. Return whether the request is running."""
        if (kept := self._kept.get(request_id)) is not None and kept.client == client:
            self._remove_kept(request_id)
        served = self._running.get(request_id)
        if served is None:
            return False
        if served.client == client:
            served.client = None
            self._cancel(served)
        return True

    def disconnect(self, client: C) -> None:
        """The client's connection broke: its requests are cancelled, at once or after their grace."""
        for served in (*self._running.values(), *self._kept.values()):
            if served.client == client:
                served.client = None
                if not served.is_over:
                    self._cancel_later(served)

    def find_detached(self, request_id: str) -> ServedRequest[C] | None:
        """The newest attempt of this request that can be attached to."""
        return next((served for served in self._attempts(request_id) if served.can_attach), None)

    def has_attached(self, request_id: str) -> bool:
        """Whether an attempt of this request could be attached to if its connection broke."""
        return any(served.is_recorded and served.client is not None for served in self._attempts(request_id))

    def attach(self, served: ServedRequest[C], client: C) -> None:
        """Send the following chunks to this client. The earlier ones are in `served.chunks`."""
        assert served.client is None
        served.client = client
        if not served.is_over:
            _stop_timer(served)

    def close(self) -> None:
        for served in (*self._running.values(), *self._kept.values()):
            _stop_timer(served)
        self._kept.clear()

    def _attempts(self, request_id: str) -> Iterator[ServedRequest[C]]:
        for requests in (self._running, self._kept):
            for served in reversed(requests.values()):
                if request_id in (served.request_id, client_request_id(served.request_id)):
                    yield served

    def _cancel_later(self, served: ServedRequest[C]) -> None:
        if served.grace_s > 0 and not served.is_cancelled:
            served.timer = asyncio.get_running_loop().call_later(served.grace_s, self._cancel, served)
        else:
            self._cancel(served)

    def _cancel(self, served: ServedRequest[C]) -> None:
        served.is_cancelled = True
        served.chunks.clear()
        _stop_timer(served)
        self._cancel_request(served.request_id)

    def _end(self, served: ServedRequest[C], last: TokenChunk) -> None:
        del self._running[served.request_id]
        _stop_timer(served)
        served.is_over = True
        if served.is_recorded and last.finish_reason in ("stop", "length"):
            self._kept[served.request_id] = served
            self._num_kept_tokens += served.num_tokens
            loop = asyncio.get_running_loop()
            served.timer = loop.call_later(served.grace_s, self._remove_kept, served.request_id)
            while self._num_kept_tokens > self._max_kept_tokens:
                self._remove_kept(next(iter(self._kept)))

    def _remove_kept(self, request_id: str) -> None:
        served = self._kept.pop(request_id, None)
        if served is not None:
            _stop_timer(served)
            self._num_kept_tokens -= served.num_tokens


def _stop_timer(served: ServedRequest[C]) -> None:
    if served.timer is not None:
        served.timer.cancel()
        served.timer = None
