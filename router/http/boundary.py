"""`RequestBoundary`: whatever becomes of a request is an answer, counted and recorded; faults of ours are logged."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from starlette.types import Scope, Send

from tensorweave.cluster.errors import RequestCancelled, TensorweaveError
from tensorweave.router.http import asgi
from tensorweave.router.http.metrics import RouterMetrics
from tensorweave.router.http.request_record import Recorder, RequestRecord

logger = logging.getLogger(__name__)

INTERNAL_ERROR: Final = "internal error; see the server's log under this request's id"


class RequestBoundary:
    """Of the route at `path`. `recorders` are told of each request that has ended."""

    def __init__(self, path: str, metrics: RouterMetrics, recorders: Sequence[Recorder]) -> None:
        self._path = path
        self._metrics = metrics
        self._recorders = recorders

    async def run(self, scope: Scope, send: Send, serve: Callable[[RequestRecord], Awaitable[None]]) -> None:
        """`serve` answers the request, or raises before it has begun to. It fills in the record."""
        record = RequestRecord(asgi.request_id_of(scope), self._path, time.perf_counter(), asgi.trace_parent(scope))
        try:
            await serve(record)
            status = 200
        except asgi.ClientGone:
            status, record.error_code = RequestCancelled.http_status, RequestCancelled.code
        except TensorweaveError as error:
            status, record.error_code = error.http_status, error.code
            self._metrics.count_error(error)
            await asgi.send_error(scope, send, error)
        except (Exception, SystemExit):  # the request boundary
            logger.exception("request %s: internal error", asgi.request_id_of(scope))
            status, record.error_code = 500, TensorweaveError.code
            await asgi.send_error(scope, send, TensorweaveError(INTERNAL_ERROR))
        record.end(status)
        self._metrics.count_answer(record)
        for recorder in self._recorders:
            recorder.record(record)
