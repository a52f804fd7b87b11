"""`OrderThread`: where a rank carries out rank 0's orders about what it has in memory, beside the step loop."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from tensorweave.cluster.errors import TensorweaveError

logger = logging.getLogger(__name__)

Order = TypeVar("Order")

_MAX_PROBLEM: Final = 1000
_EXIT_TIMEOUT_S: Final = 5.0


class OrderThread(Generic[Order]):
    """Carries out orders one after the other. The thread starts with the first."""

    def __init__(self, name: str, carry_out: Callable[[Order], None]) -> None:
        self._name = name
        self._carry_out = carry_out
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, orders: Sequence[Order]) -> None:
        if orders and self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        for order in orders:
            self._orders.put(order)

    def close(self) -> None:
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join(_EXIT_TIMEOUT_S)

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            self._carry_out(order)


def problem_of(work: Callable[[], None], what: str) -> str:
    """Do the work of an order. Return what went wrong, for an `OrderReport`; `what` names the work in the log."""
    try:
        work()
    except (TensorweaveError, ValueError) as error:
        return str(error)[:_MAX_PROBLEM] or type(error).__name__
    except Exception as error:  # the request's boundary: whatever a library raises over what a stranger has sent
        logger.exception("%s failed", what)
        return f"{type(error).__name__}: {error}"[:_MAX_PROBLEM]
    return ""
