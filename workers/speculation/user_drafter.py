"""`UserDrafter`: a user's object drafts, on rank 0; the other ranks are told what.

So a user's code may keep a state and ask others, and need not give the same on every rank.
"""

from __future__ import annotations

import logging
import operator
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgpack

from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.speculation.drafter import NOTHING, Draft
from tensorweave.workers.step.request import LlmRequest

logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 5.0
"""For one call of a user's code, which may load something in the first one. The whole step waits for it."""


@dataclass(slots=True)
class DraftRequest:
    """A request that may be given drafts: set `py_draft_tokens`, up to `max_draft_len` tokens that may follow `tokens`.

    Args:
        request_id: its number in its gang.
        tokens: prompt and output so far; read only.
        prompt_len: how many of them are the prompt's.
        max_draft_len: tokens beyond these are not used.
    """

    request_id: int
    tokens: Sequence[int]
    prompt_len: int
    max_draft_len: int
    py_draft_tokens: Sequence[int] = field(default=())

    def get_tokens(self, beam: int = 0) -> list[int]:
        """A copy of the tokens; there is one beam."""
        return list(self.tokens)


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """What `prepare_draft_tokens` gets: the requests that decode in the next step."""

    generation_requests: Sequence[DraftRequest]


class PreparesDrafts(Protocol):
    def prepare_draft_tokens(self, scheduled_requests: DraftBatch) -> object:
        """Set `py_draft_tokens` of the requests for which there are drafts."""


class UserDrafter:
    """If the user's code raises or takes longer than `timeout_s`, it is asked no more and nothing is drafted; the
    answers stay the same."""

    def __init__(self, drafter: PreparesDrafts, comm: Comm, timeout_s: float = _TIMEOUT_S) -> None:
        self._caller: _Caller | None = _Caller(drafter) if comm.rank == 0 else None
        self._comm = comm
        self._timeout_s = timeout_s

    def draft(self, wanted: Sequence[tuple[LlmRequest, int]]) -> Sequence[Draft]:
        drafts = self._ask(wanted) if self._comm.rank == 0 else None
        if self._comm.size > 1:
            drafts = msgpack.unpackb(self._comm.agree(None if drafts is None else msgpack.packb(drafts)))
        assert drafts is not None
        return [Draft(tokens) if tokens else NOTHING for tokens in drafts]

    def forget(self, request: LlmRequest) -> None:
        """The user's `resource_manager` is told of it."""

    def close(self) -> None:
        caller, self._caller = self._caller, None
        if caller is not None:
            caller.close()

    def _ask(self, wanted: Sequence[tuple[LlmRequest, int]]) -> list[list[int]]:
        if self._caller is None:
            return [[] for _ in wanted]
        requests = [DraftRequest(each.order, tuple(each.tokens), each.prompt_len, limit) for each, limit in wanted]
        try:
            self._caller.call(DraftBatch(tuple(requests)), self._timeout_s)
            return [_token_ids(request) for request in requests]
        except Exception:  # the boundary of a user's code, without which answers come as well
            logger.exception("the drafter of speculative_config failed; nothing is drafted any more")
            self.close()
            return [[] for _ in wanted]


class _Caller:
    """Calls a user's code on a thread of its own, so that a call can be given up."""

    def __init__(self, drafter: PreparesDrafts) -> None:
        self._drafter = drafter
        self._batches: queue.SimpleQueue[DraftBatch | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="user-drafter", daemon=True).start()

    def call(self, batch: DraftBatch, timeout_s: float) -> None:
        """Raises what the code raises, and TimeoutError."""
        self._batches.put(batch)
        try:
            error = self._outcomes.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no drafts within {timeout_s:g} s") from None
        if error is not None:
            raise error

    def close(self) -> None:
        """The thread ends after its call."""
        self._batches.put(None)

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            error: Exception | None = None
            try:
                self._drafter.prepare_draft_tokens(batch)
            except Exception as raised:  # the boundary of a user's code
                error = raised
            self._outcomes.put(error)


def _token_ids(request: DraftRequest) -> list[int]:
    """Plain integers that fit into 8 bytes."""
    tokens: Any = request.py_draft_tokens
    ids = [operator.index(token) for token in list(tokens)[: request.max_draft_len]]
    return [token if 0 <= token < 1 << 31 else -1 for token in ids]
