"""`Guides`: one rank's side of grammars, as the executor sees it, and `NoGuides` where they are switched off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import torch

from tensorweave.cluster.errors import RequestRejected, WorkerLost
from tensorweave.cluster.guide import GUIDE_PARAM, Guide
from tensorweave.cluster.protocol import GenerateRequest
from tensorweave.kernels.token_mask.chosen import compile_mask_tokens
from tensorweave.workers.gang.order_report import OrderReport
from tensorweave.workers.gang.report_channel import ReportChannel
from tensorweave.workers.guided.admission import GuideAdmission, GuideInbox, Refuse
from tensorweave.workers.guided.compilers import Compilers, make_ready
from tensorweave.workers.guided.orders import GuideOrder
from tensorweave.workers.guided.table import GrammarTable
from tensorweave.workers.guided.trials import Trials
from tensorweave.workers.step.grammar import Grammar
from tensorweave.workers.step.hold import Put

_CPU: Final = torch.device("cpu")


class Guides(Protocol):
    def start(self, inbox: GuideInbox, refuse: Refuse) -> None:
        """Before the first step. Rank 0 alone uses the arguments."""

    def admit(self, request: GenerateRequest, put: Put) -> None:
        """Rank 0, any thread: put a request with a guide into the inbox, where it arrives once its grammar is ready on
        all ranks. Raises RequestRejected."""

    def grammar_of(self, guide: Guide) -> Grammar | None:
        """The step loop, for a request that has arrived. None for one that was held and has ended: it was cancelled."""

    def follow(self, orders: Sequence[GuideOrder]) -> None:
        """The step loop, on every rank alike, after the step's arrivals."""

    def gauges(self) -> dict[str, float]:
        """From any thread: counters for metrics."""

    def shutdown(self) -> None: ...


class NoGuides:
    def start(self, inbox: GuideInbox, refuse: Refuse) -> None:
        return None

    def admit(self, request: GenerateRequest, put: Put) -> None:
        raise RequestRejected("grammars are switched off here (guided_decoding_backend)", param=GUIDE_PARAM)

    def grammar_of(self, guide: Guide) -> Grammar | None:
        return None

    def follow(self, orders: Sequence[GuideOrder]) -> None:
        assert not orders, "grammars are switched off"

    def gauges(self) -> dict[str, float]:
        return {}

    def shutdown(self) -> None:
        return None


class RankGuides:
    """Compiles on a thread of this rank. What steps would wait for then is done when this is made.

    Args:
        rank: Of this rank.
        size: Ranks of the gang.
        trials: Reads the tokenizer; on rank 0 it tries guides too.
        reports: How the other ranks tell rank 0 what they have compiled.
        device: Where the logits are.
        loads_early: Start the process of the trials and read the vocabulary before the first step, without waiting for
            them, and not when the first guide comes: two seconds of processor time, which steps would miss.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        trials: Trials,
        reports: ReportChannel,
        device: torch.device = _CPU,
        *,
        loads_early: bool = False,
    ) -> None:
        self._rank = rank
        self._size = size
        self._trials = trials
        self._reports = reports
        self._table = GrammarTable(rank, self._open_compilers, self._report, self._stop)
        self._admission: GuideAdmission | None = None
        self._loads_early = loads_early
        self._ready = make_ready(trials.source, trials.vocab_size)
        compile_mask_tokens(device)

    def start(self, inbox: GuideInbox, refuse: Refuse) -> None:
        if self._rank == 0:
            self._admission = GuideAdmission(self._size, self._trials, inbox, refuse)
        self._reports.start(self._take_report)
        if self._loads_early:
            self._table.follow([GuideOrder("load")])

    def admit(self, request: GenerateRequest, put: Put) -> None:
        assert self._admission is not None, "only rank 0 takes requests, once it has started"
        self._admission.admit(request, put)

    def grammar_of(self, guide: Guide) -> Grammar | None:
        return self._table.get(guide)

    def follow(self, orders: Sequence[GuideOrder]) -> None:
        self._table.follow(orders)

    def gauges(self) -> dict[str, float]:
        admission = self._admission
        if admission is None:
            return {}
        return {"grammars_cached": admission.num_ready, "grammars_refused_total": admission.num_refused}

    def shutdown(self) -> None:
        if self._admission is not None:
            self._admission.close()
        self._trials.close()  # first: the table's thread may wait for it
        self._table.close()
        self._reports.close()

    def _open_compilers(self) -> Compilers:
        vocabulary = self._trials.vocabulary()
        if self._rank:
            self._trials.close()  # guides are tried by rank 0
        return Compilers(vocabulary, self._ready)

    def _stop(self, digest: bytes) -> None:
        if self._admission is not None:  # rank 0 measures for all
            self._admission.stop(digest)

    def _report(self, report: OrderReport) -> None:
        try:
            self._reports.send(report.to_wire())
        except WorkerLost:
            return  # rank 0 is gone, and this rank's step loop will notice

    def _take_report(self, message: object) -> None:
        assert self._admission is not None
        self._admission.take_report(OrderReport.from_wire(message))
