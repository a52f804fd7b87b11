"""`Booking`: an attempt's share of the loads. What it is told of the attempt teaches the speeds of its gangs."""

from __future__ import annotations

from typing import Final, Self

from tensorweave.cluster.link import GangLink
from tensorweave.router.dispatch.loads import GangLoad, Loads

_WINDOW_S: Final = 0.1
_LONG_TOKENS: Final = 1000


class Booking:
    """One attempt's share of the loads, from construction to `close`. Times are on the caller's clock."""

    def __init__(
        self,
        loads: Loads,
        *,
        prefill: GangLink | None,
        decode: GangLink,
        num_prefill: int,
        num_moved: int,
        num_prompt: int,
        num_reserved: int,
        now_s: float,
    ) -> None:
        self._prefiller = loads.of((prefill or decode).gang_id)
        self._decoder = loads.of(decode.gang_id)
        self._handover = None if prefill is None else loads.handover(prefill, decode)
        self._num_queued = num_prefill
        self._num_before = self._prefiller.queued_tokens
        self._num_prompt = num_prompt
        self._num_moved = num_moved
        self._kv_tokens = num_prompt + num_reserved
        self._started_s = now_s
        self._beside = _Beside(self._prefiller, now_s)
        self._first_s: float | None = None
        self._stream: _Stream | None = None
        self._num_told = 0
        loads.now_s = now_s
        self._is_long = num_prefill >= _LONG_TOKENS
        if self._is_long:
            self._prefiller.long_prompts.add(now_s)
            self._prefiller.num_long_prompts += 1
        self._prefiller.queued_tokens += num_prefill
        self._prefiller.num_prompts += 1
        self._is_queued = True
        self._decoder.num_decoding += 1
        self._decoder.kv_tokens += self._kv_tokens

    def prefilled(self, num_cached: int, now_s: float) -> None:
        """Record the first token from the gang that computed the prompt."""
        if self._first_s is None:
            self._first_s = now_s
            if self._num_queued:
                num_done = max(self._num_before + self._num_prompt - num_cached, 1)
                self._prefiller.prefill.add(num_done, now_s - self._started_s)
                self._beside.end(self._prefiller, num_done, now_s)
        self._unqueue()
        if self._handover is None:
            self._begin_stream(now_s)

    def handed_over(self, now_s: float) -> None:
        """Record the decode gang's own first token."""
        if self._handover is not None and self._first_s is not None:
            self._handover.add(self._num_moved, now_s - self._first_s)
        self._unqueue()
        self._begin_stream(now_s)

    def told(self, num_tokens: int, now_s: float) -> None:
        """Record further tokens from the gang that answers."""
        self._num_told += num_tokens
        self._decoder.num_told += num_tokens
        if self._stream is not None:
            self._stream.told(self._decoder, num_tokens, now_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()

    def close(self) -> None:
        self._unqueue()
        self._decoder.num_decoding -= 1
        self._decoder.kv_tokens -= self._kv_tokens
        if self._stream is not None:
            self._stream = None
            self._decoder.num_streaming -= 1
            self._decoder.answer_tokens.add(self._num_told)

    def _begin_stream(self, now_s: float) -> None:
        if self._stream is None:
            self._stream = _Stream(self._decoder, now_s)
            self._decoder.num_streaming += 1

    def _unqueue(self) -> None:
        self._prefiller.queued_tokens -= self._num_queued
        self._num_queued = 0
        if self._is_queued:
            self._is_queued = False
            self._prefiller.num_prompts -= 1
            self._prefiller.num_long_prompts -= self._is_long


class _Stream:
    """A sequence's tokens, in windows: those without a prompt at the gang say how long a token takes, the others how
    long it takes beside prompts."""

    def __init__(self, gang: GangLoad, now_s: float) -> None:
        self._begin(gang, now_s)

    def _begin(self, gang: GangLoad, now_s: float) -> None:
        self._began_s, self._num_tokens, self._is_quiet = now_s, 0, not gang.num_prompts
        self._slowest_s, self._last_s, self._is_long = 0.0, now_s, gang.num_long_prompts > 0

    def told(self, gang: GangLoad, num_tokens: int, now_s: float) -> None:
        self._num_tokens += num_tokens
        self._slowest_s, self._last_s = max(self._slowest_s, now_s - self._last_s), now_s
        self._is_long = self._is_long or gang.num_long_prompts > 0
        if self._is_quiet != (not gang.num_prompts):
            self._begin(gang, now_s)
        elif now_s - self._began_s >= _WINDOW_S and self._num_tokens:
            if self._is_quiet:
                gang.interval.add(gang.num_streaming, (now_s - self._began_s) / self._num_tokens)
            elif self._is_long:
                gang.slow_interval.add(self._slowest_s)
            self._begin(gang, now_s)


class _Beside:
    """What sequences lose that decode while a prompt waits and is computed at their gang: they tell fewer tokens in
    that time than they would alone."""

    def __init__(self, gang: GangLoad, now_s: float) -> None:
        self._began_s, self._num_told, self._num_streaming = now_s, gang.num_told, gang.num_streaming

    def end(self, gang: GangLoad, num_computed: int, now_s: float) -> None:
        num_streams = (self._num_streaming + gang.num_streaming) / 2
        if num_streams < 1 or not gang.interval.num_samples:
            return
        duration_s, num_told = now_s - self._began_s, gang.num_told - self._num_told
        lost_s = duration_s - num_told / num_streams * gang.interval.seconds(num_streams)
        computing_s = gang.prefill.per_token_s * num_computed
        if computing_s > 0:
            gang.stall_share.add(min(max(lost_s / computing_s, 0.0), 1.0))
