"""`Experiment`: rounds of load and fault over one service after another, and the result of each fault.

start ─▶ oracle ─▶ ┌▶ load ─▶ fault ─▶ open requests end ─▶ load ends ─▶ recovered? ──┐ ─▶ end
                   └──────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tensorweave.cli.chaos_faults import Fault, PreparedFault, prepare, wait_until_midway
from tensorweave.cli.process_tree import ProcessTree
from tensorweave.cli.trial_load import Load, OracleFailed, Outcome, record_oracle
from tensorweave.cli.trial_requests import TrialRequest, make_requests
from tensorweave.cli.trial_service import ServiceBroken, Trial, TrialService

_EARLIEST_S: Final = 0.3
_LATEST_S: Final = 2.5
"""The fault is injected at a random time between these, or as soon after it as enough requests are running."""
_MIN_LOAD_AFTER_FAULT_S: Final = 1.0
_REASONS_SHOWN: Final = 3
_REATTACHED: Final = "tensorweave_requests_reattached_total"


@dataclass(frozen=True, slots=True)
class Settings:
    num_clients: int = 32
    num_jobs: int = 64
    seed: int = 0
    request_timeout_s: float = 120.0
    recovery_timeout_s: float = 180.0


@dataclass(slots=True)
class FaultResult:
    """The result of all rounds of one fault. All requests of a round count."""

    fault: Fault
    num_injected: int = 0
    num_requests: int = 0
    num_failed: int = 0
    num_changed: int = 0
    recover_s: list[float] = field(default_factory=list)

    def add(self, outcomes: Sequence[Outcome], fault_s: float) -> None:
        """`recover_s` of a round: the longest time after the fault that the client of any request then open waited for
        more of its answer."""
        self.num_injected += 1
        self.num_requests += len(outcomes)
        self.num_failed += sum(outcome.failure is not None for outcome in outcomes)
        self.num_changed += sum(outcome.is_changed for outcome in outcomes)
        silences_s = [outcome.longest_silence_s(fault_s) for outcome in outcomes if outcome.was_open(fault_s)]
        self.recover_s += [max(silences_s)] if silences_s else []

    @property
    def is_clean(self) -> bool:
        return not self.num_failed and not self.num_changed

    def to_plain(self) -> dict[str, Any]:
        median_s = round(statistics.median(self.recover_s), 3) if self.recover_s else None
        worst_s = round(max(self.recover_s), 3) if self.recover_s else None
        return {
            "fault": self.fault.name,
            "injected": self.num_injected,
            "requests": self.num_requests,
            "failed": self.num_failed,
            "changed": self.num_changed,
            "recover_s_median": median_s,
            "recover_s_max": worst_s,
        }


class Experiment:
    """Used once. `on_result` is called with each fault's result when its rounds are over."""

    def __init__(
        self,
        trial: Trial,
        tree: ProcessTree,
        settings: Settings,
        on_result: Callable[[FaultResult], None],
        log: Path | None = None,
    ) -> None:
        self.problems: list[str] = []
        self._trial = trial
        self._tree = tree
        self._settings = settings
        self._on_result = on_result
        self._log = log
        self._service: TrialService | None = None
        self._jobs: list[TrialRequest] = []
        self._draws = random.Random(settings.seed)
        self._num_rounds = 0

    async def run(self, faults: Sequence[Fault], num_rounds: int) -> list[FaultResult]:
        """Raises ServiceBroken or OracleFailed when there is nothing to go on with."""
        results = []
        try:
            for fault in faults:
                result = FaultResult(fault)
                for number in range(1, num_rounds + 1):
                    await self._round(result, number)
                results.append(result)
                self._on_result(result)
        except asyncio.CancelledError:
            await self._end_service(is_orderly=False)
            raise
        finally:
            await self._end_service()
        return results

    async def _round(self, result: FaultResult, number: int) -> None:
        service = self._service or await self._start_service()
        fault, settings = result.fault, self._settings
        self._num_rounds += 1
        round_id = f"chaos-{settings.seed}-{self._num_rounds}"
        load = Load(service.front_ends(settings.request_timeout_s), round_id, resends=fault.breaks_connections)
        gangs, reattached = await service.gang_ids(), await service.counts(_REATTACHED)
        prepared = await prepare(fault, service, self._draws)
        fault_s = await self._disturb(load, fault, prepared)
        result.add(load.outcomes, fault_s)
        self._report(result, number, load.outcomes, fault_s)
        if num_sent_again := sum(outcome.num_sends > 1 for outcome in load.outcomes):
            num_resumed = _increase(reattached, await service.counts(_REATTACHED))
            say(f"  {num_sent_again} sent again, {num_resumed:.0f} resumed")
        await self._restore(service, fault, prepared, gangs)

    async def _disturb(self, load: Load, fault: Fault, prepared: PreparedFault) -> float:
        """Run the load, inject the fault during it, and return when that was."""
        jobs = self._draws.sample(self._jobs, len(self._jobs))
        running = asyncio.create_task(load.run(jobs, self._settings.num_clients))
        try:
            await asyncio.sleep(self._draws.uniform(_EARLIEST_S, _LATEST_S))
            await wait_until_midway(fault, load, self._settings.num_clients, self._settings.request_timeout_s)
            fault_s = time.perf_counter()
            prepared.inject()
            await asyncio.sleep(_MIN_LOAD_AFTER_FAULT_S)
            closing = asyncio.create_task(load.until_closed(fault_s))
            await asyncio.wait({running, closing}, return_when=asyncio.FIRST_COMPLETED)
            closing.cancel()
            load.stop()
            await running
            return fault_s
        finally:
            running.cancel()

    async def _restore(self, service: TrialService, fault: Fault, prepared: PreparedFault, gangs: set[str]) -> None:
        """Wait until the service has recovered. If it does not, end it, so that the next round starts a new one."""
        if fault.ends_service:
            await self._end_service()
            return
        try:
            gone = () if prepared.pid is None else (prepared.pid,)
            if not await service.await_recovery(gone, self._settings.recovery_timeout_s):
                say("a gang has failed after repeated faults; restarting the service")
                await self._end_service()
            elif lost := gangs - {prepared.gang_id} - await service.gang_ids():
                self._note(f"{fault.name}: lost although it had no fault: {', '.join(sorted(lost))}")
        except ServiceBroken as problem:
            self._note(str(problem))
            await self._end_service()

    async def _start_service(self) -> TrialService:
        say("starting the service")
        self._service = service = TrialService(self._trial, self._tree, self._log)
        await service.start()
        await service.await_recovery((), self._settings.recovery_timeout_s)
        if not self._jobs:
            settings = self._settings
            jobs = make_requests(self._trial.config.model_name, settings.num_jobs, settings.seed)
            began_s, gangs = time.perf_counter(), await service.gang_ids()
            front_ends = service.front_ends(settings.request_timeout_s)
            self._jobs = await record_oracle(front_ends, jobs, settings.num_clients)
            if lost := gangs - await service.gang_ids():
                raise OracleFailed(f"gang {', '.join(sorted(lost))} ended in the undisturbed run")
            say(f"{len(jobs)} answers recorded undisturbed in {time.perf_counter() - began_s:.1f} s")
        return service

    async def _end_service(self, *, is_orderly: bool = True) -> None:
        service, self._service = self._service, None
        if service is None:
            return
        try:
            await service.end()
        except ServiceBroken as problem:
            if is_orderly:
                self._note(str(problem))

    def _note(self, problem: str) -> None:
        say(problem)
        self.problems.append(problem)

    def _report(self, result: FaultResult, number: int, outcomes: Sequence[Outcome], fault_s: float) -> None:
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        changes = [outcome for outcome in outcomes if outcome.is_changed]
        silence_s = max((o.longest_silence_s(fault_s) for o in outcomes if o.was_open(fault_s)), default=0.0)
        num_open = sum(outcome.was_open(fault_s) for outcome in outcomes)
        say(
            f"{result.fault.name} {number}: {len(outcomes)} requests, {num_open} open, "
            f"{len(failures)} failed, {len(changes)} changed, longest silence {silence_s:.2f} s"
        )
        for reason in list(dict.fromkeys(failures))[:_REASONS_SHOWN]:
            say(f"  failed: {reason}")
        for outcome in changes[:_REASONS_SHOWN]:
            say(f"  changed: {_difference(outcome)}")


def _increase(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """The increase of counters by front end; that of a replaced front end began at 0 again."""
    return sum(count - before.get(port, 0.0) * (count >= before.get(port, 0.0)) for port, count in after.items())


def _difference(outcome: Outcome) -> str:
    got, due = outcome.answer, outcome.job.answer
    assert got is not None
    assert due is not None
    same = next((i for i, (a, b) in enumerate(zip(got.text, due.text, strict=False)) if a != b), None)
    at = min(len(got.text), len(due.text)) if same is None else same
    return (
        f"at character {at}: {got.text[at : at + 20]!r} ({got.num_output} tokens, {got.finish_reason}), "
        f"undisturbed {due.text[at : at + 20]!r} ({due.num_output} tokens, {due.finish_reason}); "
        f"sent {outcome.num_sends} times, temperature {outcome.job.body['temperature']}"
    )


def say(line: str) -> None:
    print(f"chaos: {line}", file=sys.stderr, flush=True)
