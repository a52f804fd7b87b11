"""`CompletionOutput`: one generated sequence as a consumer sees it, and the `Update`s that it grows by.

A diff is what the consumer's last step brought, however often it is read: one update of a stream, or everything that
arrived while the consumer waited for the end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorweave.cluster.protocol import FinishReason, TokenLogprobs
from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
from tensorweave.router.text.generation import TextDelta
from tensorweave.workers.sampling.logits import Tensor, read_logits

_PROTOTYPE = {"status": "prototype"}


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural log-probability, and its rank among all tokens; the likeliest token has rank 1."""

    logprob: float
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class TimingMetrics:
    """Seconds on the clock of `time.monotonic`: when `generate` was called, when the first and the last token came."""

    arrival_time: float
    first_token_time: float
    last_token_time: float


@dataclass(frozen=True, slots=True)
class RequestPerfMetrics:
    """Measurements of one sequence from the caller's side, so they include the detokenizer and the event loop."""

    timing_metrics: TimingMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What the LLM's event loop sends to a consumer: what is new in a sequence, or the error that ended the request."""

    index: int = 0
    text: str = ""
    token_ids: Sequence[int] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    logits: bytes = b""
    context_logits: bytes = b""
    disaggregated_params: DisaggregatedParams | None = None
    error: Exception | None = None
    at_s: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, delta: TextDelta, phase: DisaggregatedParams | None = None) -> Update:
        return cls(
            index=delta.index,
            text=delta.text,
            token_ids=delta.token_ids,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            num_cached_tokens=delta.num_cached_tokens,
            logprobs=delta.logprobs,
            prompt_logprobs=delta.prompt_logprobs,
            logits=delta.logits,
            context_logits=delta.context_logits,
            disaggregated_params=phase,
        )


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What an output has besides tokens; see SamplingParams. `arrival_s` is on the monotonic clock. Each output begins
    with `num_echoed` tokens of the prompt."""

    logprobs: bool = False
    perf_metrics: bool = False
    vocab_size: int = 0
    num_echoed: int = 0
    arrival_s: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence.

    Attributes:
        index: Its index among the request's outputs.
        text: The text so far; empty without a tokenizer.
        token_ids: The ids so far, the stop token included.
        cumulative_logprob: Sum of the output tokens' log-probabilities, if they were asked for or decided the order.
        logprobs: If asked for, one dict per output token, from token id to `Logprob`: the token itself first, then the
            likeliest ones.
        prompt_logprobs: If asked for, the same for each prompt token from the second on.
        finish_reason: 'stop', 'length', 'timeout' or 'cancelled' once it has ended; 'not_finished' after a context
            phase.
        stop_reason: The stop string or stop token id that ended it; None for end-of-sequence.
        disaggregated_params: After a context phase, what its generation phase needs.
        additional_context_outputs: None: no model has other outputs yet.
        additional_generation_outputs: The same.
        request_perf_metrics: If asked for, when the request and its tokens arrived; None before the first token.
        generation_logits: If asked for, the model's logits for each output token, float32 [tokens, V].
        length: Number of token ids.
        text_diff: Text that is new: of one iteration of a stream, or all that `result` waited for.
        token_ids_diff: Ids that are new.
        logprobs_diff: Entries of `logprobs` that are new.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    additional_context_outputs: Mapping[str, Any] | None = field(default=None, repr=False, metadata=_PROTOTYPE)
    additional_generation_outputs: Mapping[str, Any] | None = field(default=None, repr=False, metadata=_PROTOTYPE)
    disaggregated_params: DisaggregatedParams | None = field(default=None, metadata=_PROTOTYPE)
    request_perf_metrics: RequestPerfMetrics | None = field(default=None, metadata=_PROTOTYPE)
    _options: OutputOptions = field(default_factory=OutputOptions, repr=False, compare=False)
    _logits: list[bytes] = field(default_factory=list, repr=False)
    _last_text_len: int = field(default=0, repr=False, compare=False)
    _last_token_len: int = field(default=0, repr=False, compare=False)
    _last_logprob_len: int = field(default=0, repr=False, compare=False)

    @property
    def generation_logits(self) -> Tensor | None:
        return read_logits(b"".join(self._logits), self._options.vocab_size) if self._logits else None

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        return self.text[self._last_text_len :]

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._last_token_len :]

    @property
    def logprobs_diff(self) -> list[dict[int, Logprob]]:
        return self.logprobs[self._last_logprob_len :]

    def _reset_diffs(self) -> None:
        """Make the diffs empty."""
        self._last_text_len, self._last_token_len = len(self.text), len(self.token_ids)
        self._last_logprob_len = len(self.logprobs)

    def _apply(self, update: Update) -> None:
        self.text += update.text
        self.token_ids.extend(update.token_ids)
        if update.logprobs:
            total = sum(token[0].logprob for token in update.logprobs)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + total
            if self._options.logprobs:
                self.logprobs += as_dicts(update.logprobs)
        if update.logits:
            self._logits.append(update.logits)
        self.finish_reason = update.finish_reason
        self.stop_reason = update.stop_reason
        self.disaggregated_params = update.disaggregated_params or self.disaggregated_params
        if self._options.perf_metrics and update.token_ids:
            before = self.request_perf_metrics
            first_s = update.at_s if before is None else before.timing_metrics.first_token_time
            self.request_perf_metrics = RequestPerfMetrics(TimingMetrics(self._options.arrival_s, first_s, update.at_s))


def as_dicts(logprobs: Sequence[TokenLogprobs]) -> list[dict[int, Logprob]]:
    """One per token, by token id."""
    return [{p.token_id: Logprob(p.logprob, p.rank) for p in token} for token in logprobs]
