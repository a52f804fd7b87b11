"""`Streams`: a leader's requests, who hears each, and what those that may be asked for again have said so far.

    running, heard ──its listener cancels──▶ ending ──last chunk──▶ gone
        │    │ ──its connection breaks──▶ running, unheard ──grace_s pass──▶ ending
        │    └◀────────── attach ──────────────┘ │
        │                                        └─last chunk─▶ over, unheard ──grace_s pass──▶ gone
        └─last chunk─▶ over, heard ──its connection breaks──────────▶┘ (with grace_s 0: gone)
                            └──its listener cancels: it has taken the answer──▶ gone

Only what nobody hears can be found and attached to, so that an answer never goes to two clients, whatever names they
give their requests. Belongs to the leader's loop thread.
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
"""Of prompts and answers that are over and kept (see `Stream.weight`): the oldest go first."""


_L = TypeVar("_L")


@dataclass(eq=False, slots=True)
class Stream(Generic[_L]):
    """One request. `listener` is who hears it: None once its connection broke. `chunks` are those so far, where it may
    be asked for again; `is_ending`: it has been cancelled.

    `is_kept`: all of the answer can be told again. Logits are not kept; and of a beginning that another attempt
    generated only the ids are known here: where more was asked for, whoever asks again gets it generated anew.
    """

    request: GenerateRequest
    listener: _L | None
    chunks: list[TokenChunk] = field(default_factory=list)
    is_ending: bool = False
    is_over: bool = False
    timer: asyncio.TimerHandle | None = None
    is_kept: bool = field(init=False)

    def __post_init__(self) -> None:
        request, sampling = self.request, self.request.sampling
        has_logits = sampling.wants_context_logits or sampling.wants_generation_logits
        lacks_some = request.num_replayed > 0 and (sampling.wants_extras or sampling.needs_prompt_rows)
        self.is_kept = self.grace_s > 0 and request.offer is None and not has_logits and not lacks_some

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def grace_s(self) -> float:
        return min(self.request.grace_s, MAX_GRACE_S)

    @property
    def replayed(self) -> list[int]:
        """The answer's beginning, where another attempt has generated it."""
        request = self.request
        return list(request.prompt_token_ids[len(request.prompt_token_ids) - request.num_replayed :])

    @property
    def is_wanted(self) -> bool:
        """All of it may be asked for again."""
        return self.is_kept and not self.is_ending

    @property
    def can_be_found(self) -> bool:
        return self.is_wanted and self.listener is None

    @property
    def weight(self) -> int:
        """What it takes to keep, in tokens: a log-probability counts as one."""
        return len(self.request.prompt_token_ids) + sum(_weight(chunk) for chunk in self.chunks)


def _weight(chunk: TokenChunk) -> int:
    return len(chunk.token_ids) + chunk.num_logprobs


def family(request_id: str) -> str:
    """The client's request that an attempt belongs to: attempts are named "id/x"."""
    return request_id.rpartition("/")[0] or request_id


class Streams(Generic[_L]):
    """`cancel` ends a request at the executor: its last chunk follows."""

    def __init__(self, cancel: Callable[[str], object], *, max_kept_tokens: int = MAX_KEPT_TOKENS) -> None:
        self._cancel = cancel
        self._max_kept_tokens = max_kept_tokens
        self._running: dict[str, Stream[_L]] = {}
        self._kept: collections.OrderedDict[str, Stream[_L]] = collections.OrderedDict()
        self._num_kept_tokens = 0

    @property
    def running_ids(self) -> list[str]:
        return list(self._running)

    def __len__(self) -> int:
        """Those that run."""
        return len(self._running)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def runs(self, request_id: str) -> bool:
        return request_id in self._running

    def open(self, request: GenerateRequest, listener: _L) -> None:
        assert request.request_id not in self._running
        self._drop_kept(request.request_id)
        self._running[request.request_id] = Stream(request, listener)

    def note(self, chunk: TokenChunk) -> _L | None:
        """A chunk has come: who hears it."""
        stream = self._running.get(chunk.request_id)
        if stream is None:
            return None
        if stream.is_wanted:
            stream.chunks.append(chunk)
        if chunk.is_last:
            self._end(stream, chunk)
        return stream.listener

    def cancel(self, request_id: str, listener: _L) -> bool:
        """Its listener wants no more, or has taken all. False where it does not run."""
        if (kept := self._kept.get(request_id)) is not None and kept.listener == listener:
            self._drop_kept(request_id)
        stream = self._running.get(request_id)
        if stream is None:
            return False
        if stream.listener == listener:
            stream.listener = None
            self._stop(stream)
        return True

    def lose(self, listener: _L) -> None:
        """Its connection broke: what it heard ends, at once or after its grace."""
        for stream in (*self._running.values(), *self._kept.values()):
            if stream.listener == listener:
                stream.listener = None
                if not stream.is_over:
                    self._leave_alone(stream)

    def find(self, request_id: str) -> Stream[_L] | None:
        """The newest attempt of this request that runs or is kept, and that nobody hears."""
        return next((stream for stream in self._attempts(request_id) if stream.can_be_found), None)

    def is_heard(self, request_id: str) -> bool:
        """An attempt of this request could be found, were its connection to break."""
        return any(stream.is_wanted and stream.listener is not None for stream in self._attempts(request_id))

    def _attempts(self, request_id: str) -> Iterator[Stream[_L]]:
        for streams in (self._running, self._kept):
            for stream in reversed(streams.values()):
                if request_id in (stream.request_id, family(stream.request_id)):
                    yield stream

    def attach(self, stream: Stream[_L], listener: _L) -> None:
        """It hears what comes; what came is in `stream.chunks`."""
        assert stream.listener is None
        stream.listener = listener
        if not stream.is_over:
            self._stop_timer(stream)

    def close(self) -> None:
        for stream in (*self._running.values(), *self._kept.values()):
            self._stop_timer(stream)
        self._kept.clear()

    def _leave_alone(self, stream: Stream[_L]) -> None:
        if stream.grace_s > 0 and not stream.is_ending:
            stream.timer = asyncio.get_running_loop().call_later(stream.grace_s, self._stop, stream)
        else:
            self._stop(stream)

    def _stop(self, stream: Stream[_L]) -> None:
        stream.is_ending = True
        stream.chunks.clear()
        self._stop_timer(stream)
        self._cancel(stream.request_id)

    def _end(self, stream: Stream[_L], last: TokenChunk) -> None:
        del self._running[stream.request_id]
        self._stop_timer(stream)
        stream.is_over = True
        if stream.is_wanted and last.finish_reason in ("stop", "length"):
            self._kept[stream.request_id] = stream
            self._num_kept_tokens += stream.weight
            loop = asyncio.get_running_loop()
            stream.timer = loop.call_later(stream.grace_s, self._drop_kept, stream.request_id)
            while self._num_kept_tokens > self._max_kept_tokens:
                self._drop_kept(next(iter(self._kept)))

    def _drop_kept(self, request_id: str) -> None:
        stream = self._kept.pop(request_id, None)
        if stream is not None:
            self._stop_timer(stream)
            self._num_kept_tokens -= stream.weight

    def _stop_timer(self, stream: Stream[_L]) -> None:
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None
