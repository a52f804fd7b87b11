"""`RequestBoundary`: whatever happens to one request becomes an answer, is counted and is logged once with its id."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.types import Scope, Send

from tensorweave.cluster.errors import RequestCancelled, TensorweaveError
from tensorweave.router.http import asgi
from tensorweave.router.http.metrics import RouterMetrics

logger = logging.getLogger(__name__)

INTERNAL_ERROR: Final = "internal error; see the server's log under this request's id"


class RequestBoundary:
    """Of the route at `path`."""

    def __init__(self, path: str, metrics: RouterMetrics) -> None:
        self._path = path
        self._metrics = metrics

    async def run(self, scope: Scope, send: Send, serve: Callable[[], Awaitable[None]]) -> None:
        """`serve` answers the request, or raises before it has begun to."""
        started_s = time.perf_counter()
        try:
            await serve()
            status = 200
        except asgi.ClientGone:
            status = RequestCancelled.http_status
        except TensorweaveError as error:
            status = error.http_status
            self._metrics.count_error(error)
            await asgi.send_error(scope, send, error)
        except (Exception, SystemExit):  # the request boundary
            logger.exception("request %s: internal error", asgi.request_id_of(scope))
            status = 500
            await asgi.send_error(scope, send, TensorweaveError(INTERNAL_ERROR))
        self._metrics.count_answer(self._path, status)
        logger.info(
            "request %s: %s %d in %.3f s",
            asgi.request_id_of(scope),
            self._path,
            status,
            time.perf_counter() - started_s,
        )
