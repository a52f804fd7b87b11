"""Users' callables that edit logits in place: by name for single requests, and a batched one for all that ask for it.

Every rank calls them with the same logits. Whatever a callable raises ends the requests that it was called for, and no
others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.step.request import LlmRequest

# V vocabulary

LogitsProcessor: TypeAlias = Callable[[int, Tensor, list[list[int]], int | None, int | None], object]
"""(req_id, logits [1, 1, V], token_ids, stream_ptr, client_id): one sequence in `token_ids`, prompt and output."""
BatchedLogitsProcessor: TypeAlias = Callable[
    [list[int], list[Tensor], list[list[list[int]]], int | None, list[int | None]], object
]

_ONE = "logits_processor"
_BATCHED = "apply_batched_logits_processor"


class LogitsProcessors:
    """Set from any thread, run by the step loop. `req_id` is a request's number in its gang."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, LogitsProcessor] = {}
        self._batched: BatchedLogitsProcessor | None = None

    def set(self, name: str, processor: LogitsProcessor | None) -> None:
        """None removes it."""
        with self._lock:
            others = {key: value for key, value in self._by_name.items() if key != name}
            self._by_name = others if processor is None else {**others, name: processor}

    def set_batched(self, processor: BatchedLogitsProcessor | None) -> None:
        self._batched = processor

    def check(self, sampling: SamplingSpec) -> None:
        """Raises RequestRejected if the request asks for a processor that is not here."""
        for name in sampling.logits_processors:
            if name not in self._by_name:
                raise RequestRejected(f"there is no logits processor {name!r} here", param=_ONE)
        if sampling.uses_batched_processor and self._batched is None:
            raise RequestRejected("there is no batched logits processor here", param=_BATCHED)

    def run(self, logits_RV: Tensor, edited: Sequence[tuple[int, LlmRequest]]) -> dict[int, RequestRejected]:
        """Edit these rows in place. Returns the failures, by row."""
        failures: dict[int, RequestRejected] = {}
        by_name, batched = self._by_name, self._batched
        for row, request in edited:
            for name in request.sampling.logits_processors:
                failure = self._run_one(by_name.get(name), name, logits_RV[row].view(1, 1, -1), request)
                if failure is not None:
                    failures[row] = failure
                    break
        together = [(row, r) for row, r in edited if r.sampling.uses_batched_processor and row not in failures]
        if together:
            failure = self._run_batched(batched, logits_RV, together)
            if failure is not None:
                failures |= dict.fromkeys((row for row, _ in together), failure)
        return failures

    def _run_one(
        self, processor: LogitsProcessor | None, name: str, logits: Tensor, request: LlmRequest
    ) -> RequestRejected | None:
        if processor is None:
            return RequestRejected(f"the logits processor {name!r} was removed", param=_ONE)
        arguments = (request.order, logits, [list(request.tokens)], _stream_of(logits), None)
        return _call(f"the logits processor {name!r}", _ONE, processor, *arguments)

    def _run_batched(
        self,
        processor: BatchedLogitsProcessor | None,
        logits_RV: Tensor,
        together: Sequence[tuple[int, LlmRequest]],
    ) -> RequestRejected | None:
        if processor is None:
            return RequestRejected("the batched logits processor was removed", param=_BATCHED)
        orders = [request.order for _, request in together]
        rows = [logits_RV[row].view(1, 1, -1) for row, _ in together]
        tokens = [[list(request.tokens)] for _, request in together]
        clients: list[int | None] = [None] * len(together)
        arguments = (orders, rows, tokens, _stream_of(logits_RV), clients)
        return _call("the batched logits processor", _BATCHED, processor, *arguments)


def _call(what: str, param: str, processor: Callable[..., object], *arguments: Any) -> RequestRejected | None:
    """Run a user's code. Return what its requests end with if it raises."""
    try:
        processor(*arguments)
    except BaseException as error:  # the request's boundary: a user's code affects its own requests only
        return RequestRejected(f"{what} raised {type(error).__name__}: {error}", param=param)
    return None


def _stream_of(logits: Tensor) -> int | None:
    if logits.device.type != "cuda":
        return None
    stream: int = torch.cuda.current_stream(logits.device).cuda_stream
    return stream
