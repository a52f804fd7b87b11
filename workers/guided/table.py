"""`GrammarTable`: the grammars that one rank has compiled, by rank 0's orders, on a thread of its own."""

from __future__ import annotations

import functools
import logging
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

from tensorweave.cluster.guide import Guide
from tensorweave.cluster.priority import lower_thread_priority
from tensorweave.workers.gang.order_report import OrderReport
from tensorweave.workers.gang.order_thread import OrderThread, problem_of
from tensorweave.workers.guided.compilers import Compilers
from tensorweave.workers.guided.orders import GuideOrder
from tensorweave.workers.step.grammar import Grammar

logger = logging.getLogger(__name__)

TOO_SLOW: Final = "the grammar was refused: it takes too long to find the tokens that may come next"
_SHORT_S: Final = 0.01
"""Of a compilation at the usual priority, which most end within."""


class GrammarTable:
    """The step loop calls `follow` and `get`; all else happens on the thread, which starts with the first order.

    Args:
        rank: For reports.
        open_compilers: Called on the thread until it succeeds. Raises TensorweaveError.
        report: Called on the thread, once for each order to compile.
        on_slow: Called by the step loop when an output with the grammar of this digest takes too long.
    """

    def __init__(
        self,
        rank: int,
        open_compilers: Callable[[], Compilers],
        report: Callable[[OrderReport], None],
        on_slow: Callable[[bytes], None] = lambda digest: None,
    ) -> None:
        self._rank = rank
        self._open_compilers = open_compilers
        self._report = report
        self._on_slow = on_slow
        self._grammars: dict[bytes, Grammar] = {}
        self._alive: weakref.WeakValueDictionary[bytes, Grammar] = weakref.WeakValueDictionary()
        """Also those that are forgotten here, and that a request still follows."""
        self._compilers: Compilers | None = None
        self._thread = OrderThread(f"guide-compiler-{rank}", self._carry_out)

    def __len__(self) -> int:
        return len(self._grammars)

    def follow(self, orders: Sequence[GuideOrder]) -> None:
        """Take orders. Those to stop are carried out at once, as at the same step of every rank; the others on the
        thread, one after the other."""
        for order in orders:
            if order.verb == "stop" and (grammar := self._alive.get(order.digest)) is not None:
                grammar.problem = TOO_SLOW
        self._thread.put(orders)

    def get(self, guide: Guide) -> Grammar | None:
        return self._grammars.get(guide.digest)

    def close(self) -> None:
        self._thread.close()

    def _carry_out(self, order: GuideOrder) -> None:
        if order.guide is not None:
            what = f"rank {self._rank}: compiling a guide of kind {order.guide.kind}"
            problem = problem_of(functools.partial(self._compile, order.guide), what)
            self._report(OrderReport(order.guide.digest, order.number, self._rank, problem))
        elif order.verb == "load":
            self._load()
        else:
            self._grammars.pop(order.digest, None)

    def _load(self) -> None:
        """The guide that follows tries again, and reports what goes wrong."""
        try:
            self._compilers = self._compilers or self._open_compilers()
            self._compilers.open("xgrammar")
        except Exception as error:  # the thread goes on
            logger.info("rank %d: grammars cannot be compiled yet: %s", self._rank, error)

    def _compile(self, guide: Guide) -> None:
        compilers = self._compilers = self._compilers or self._open_compilers()
        compilers.open(guide.backend)
        grammar = compilers.compile(guide, _at_low_priority)
        grammar.on_slow = functools.partial(self._on_slow, guide.digest)
        self._grammars[guide.digest] = self._alive[guide.digest] = grammar


def _at_low_priority(compute: Callable[[], Any]) -> Any:
    """Compute on a thread of its own that soon leaves the cores to the step loop, where threads have priorities as on
    Linux. Only what runs without the interpreter's lock may do so: while such a thread waits for a core, it would keep
    it. So the caller lowers the priority, once the computation is under way."""
    results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((compute(), None))
        except Exception as error:  # whatever a library raises, for the caller
            results.put((None, error))
        except BaseException as error:  # a panic of a library in Rust is no Exception
            results.put((None, RuntimeError(f"{type(error).__name__}: {error}")))

    thread = threading.Thread(target=run, name="guide-compilation", daemon=True)
    thread.start()
    try:
        result, error = results.get(timeout=_SHORT_S)
    except queue.Empty:
        if sys.platform == "linux" and thread.native_id is not None:
            lower_thread_priority(thread.native_id)
        result, error = results.get()
    if error is not None:
        raise error
    return result
