"""`GangPool` keeps `replicas` gangs of one spec running: it publishes their addresses and replaces gangs that end.

    STARTING ──▶ READY ──fault──▶ RESTARTING (pause) ──▶ STARTING      after repeated faults: FAILED (long pause)
                   └──drain──▶ DRAINING ──▶ STOPPED

No slot fails permanently: a failed one is started again after increasing pauses (`cluster.fault_record`). `GangPool` is
plain asyncio and uses gangs through `PoolGang` only; `cluster.supervisor` runs pools in a Ray actor. Its size, the spec
of its gangs and which gangs are its own change while it runs: `scale`, `roll`, `release` and `adopt`.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from tensorweave.cluster.adapter_registry import AdapterRegistry
from tensorweave.cluster.errors import InsufficientResources, NotReady, TensorweaveError, WorkerLost
from tensorweave.cluster.fault_record import FaultRecord
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.pool_gang import PoolGang
from tensorweave.cluster.pool_logits_processors import PoolLogitsProcessors
from tensorweave.cluster.pool_slot import PoolSlot
from tensorweave.cluster.pool_spec import GangState, PoolSpec, PoolState
from tensorweave.cluster.protocol import GangAddress

logger = logging.getLogger(__name__)

EventKind = Literal["ready", "fault", "not placed", "scaled", "moved", "update"]
Roll = Literal["running", "done", "stopped"]

_KILL_TIMEOUT_S: Final = 15.0
_NUM_EVENTS: Final = 20


class GangPool:
    """`launch(spec, slot, epoch)` creates a gang without starting it; `on_change` is called on the event loop after
    changes. Every gang has all `adapters` before it is ready. `replicas` is how many gangs are wanted."""

    def __init__(
        self,
        spec: PoolSpec,
        launch: Callable[[GangSpec, int, int], PoolGang],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        adapters: AdapterRegistry | None = None,
    ) -> None:
        self.spec = spec
        self.replicas = spec.replicas
        self._launch = launch
        self._tell = on_change
        self._changed = asyncio.Event()
        self._clock = clock
        self._slots: list[PoolSlot] = []
        self._num_slots = 0
        self._has_served = False
        self._roll: tuple[Roll, str] | None = None
        self._trouble: str | None = None
        self._num_faults = 0
        self._num_changes: collections.Counter[str] = collections.Counter({"scaled": 0, "moved": 0, "update": 0})
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=_NUM_EVENTS)
        self._processors = PoolLogitsProcessors()
        self._adapters = adapters or AdapterRegistry()
        self._is_ending = asyncio.Event()

    def start(self, running: Mapping[int, tuple[PoolGang, GangAddress]] | None = None) -> None:
        """`running` are the gangs of an earlier supervisor, by slot, which the pool resumes."""
        taken = running or {}
        free = (number for number in itertools.count() if number not in taken)
        for number in sorted([*taken, *itertools.islice(free, max(0, self.replicas - len(taken)))]):
            self._add_slot(number, taken.get(number))
        self._num_slots = max((slot.number + 1 for slot in self._slots), default=0)

    def _grow(self) -> None:
        while len(self._staying) < self.replicas:
            self._add_slot()

    def _add_slot(self, number: int | None = None, running: tuple[PoolGang, GangAddress] | None = None) -> PoolSlot:
        """A slot with a running gang, or one that starts the first of its own."""
        if number is None:
            number, self._num_slots = self._num_slots, self._num_slots + 1
        record = FaultRecord(self.spec.max_faults, self.spec.fault_window_s, self._clock)
        slot = PoolSlot(number, self.spec.gang, record)
        self._slots.append(slot)
        if running is not None:
            slot.gang, slot.address = running
            slot.epoch, slot.spec = slot.address.epoch, slot.gang.spec
            self._note_ready(slot, slot.gang)
        slot.task = asyncio.create_task(self._run_slot(slot), name=f"pool-{self.spec.name}-{slot.number}")
        return slot

    @property
    def _staying(self) -> list[PoolSlot]:
        """Those that are not ending; the ones to end first come last."""
        staying = [slot for slot in self._slots if not slot.is_ending]
        return sorted(staying, key=lambda slot: (slot.state != "ready", slot.spec != self.spec.gang, slot.number))

    @property
    def ready(self) -> list[tuple[PoolGang, GangAddress]]:
        """The gangs that accept requests, and their addresses."""
        return [
            (slot.gang, slot.address)
            for slot in self._slots
            if slot.state == "ready" and slot.gang is not None and slot.address is not None
        ]

    @property
    def failure(self) -> str | None:
        """A pool has failed if every slot has."""
        failures = [slot.failure for slot in self._slots if not slot.is_ending]
        return failures[-1] if failures and None not in failures else None

    @property
    def state(self) -> PoolState:
        return PoolState(
            self.spec.name,
            self.replicas,
            tuple(address for _, address in self.ready),
            tuple(slot.state for slot in self._slots),
            self.failure,
            self._trouble,
            self.spec.gang.role,
        )

    def describe(self) -> dict[str, Any]:
        gangs = [
            {
                "state": slot.state,
                "epoch": slot.epoch,
                "reason": slot.failure or (slot.trouble if slot.state != "ready" else None),
                **({} if slot.gang is None else slot.gang.describe()),
            }
            for slot in self._slots
        ]
        return {
            "pool": self.spec.name,
            "role": self.spec.gang.role,
            "replicas": self.replicas,
            "gangs": gangs,
            "failure": self.failure,
            "trouble": self._trouble,
            "num_faults": self._num_faults,
            "num_changes": dict(self._num_changes),
            "update": None if self._roll is None else {"state": self._roll[0], "text": self._roll[1]},
            "events": list(self._events),
        }

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None:
        """Set them on every gang, including future ones. Raises ValueError."""
        await self._processors.update([gang for gang, _ in self.ready], processors)

    async def scale(self, replicas: int, timeout_s: float, reason: str = "") -> None:
        """Change the number of gangs. Surplus gangs get no new requests and `timeout_s` for the open ones; the newest
        are removed first, those that are not ready before the others. `reason` is for the status page."""
        if replicas < 0:
            raise ValueError(f"{replicas} replicas of pool {self.spec.name}")
        if replicas != self.replicas:
            self.keep_event("scaled", f"{self.replicas} to {replicas} gangs" + (f": {reason}" if reason else ""))
        self.replicas = replicas
        self._grow()
        await self._end_slots(self._staying[replicas:], timeout_s)

    async def _end_slots(self, slots: Sequence[PoolSlot], timeout_s: float) -> None:
        for slot in slots:
            slot.is_ending = True
        await self._drain_slots(slots, timeout_s)
        await self._stop_slots(slots)
        self._slots = [slot for slot in self._slots if slot not in slots]
        self._note_change()

    async def until_served(self) -> str | None:
        """Wait for the first gang, or until it is known that there is no room for one. Return why none can start."""
        while not (self.ready or self._is_ending.is_set() or any(slot.problem == "unplaced" for slot in self._slots)):
            if self.failure is not None:
                return self.failure
            await self._changed.wait()
        return None

    # ---- gangs of another spec

    async def roll(self, spec: PoolSpec, timeout_s: float, turn: asyncio.Lock) -> None:
        """Change to gangs of this spec, one after another, each while it holds `turn`: a new one is ready before an
        old one drains, for which it has `timeout_s`. Where the cluster has no room for one more, the old one drains
        first. If a new gang refuses to start, the old ones stay."""
        old = self.spec
        self.spec = spec
        if spec.replicas != old.replicas:
            self.replicas = spec.replicas
        num_new = 0
        self._note_roll("running", "gangs are replaced one after another")
        while self._outdated and not self._is_ending.is_set():
            async with turn:
                if not self._outdated or self._is_ending.is_set():
                    break
                if (problem := await self._replace_one(timeout_s)) is not None:
                    self.spec = replace(spec, gang=old.gang)
                    self._grow()
                    self._note_roll("stopped", f"{num_new} of {self.replicas} gangs are new: {problem}")
                    return
                num_new += 1
        if not self._is_ending.is_set():
            await self.scale(self.replicas, timeout_s)
            self._note_roll("done", f"{num_new} gangs were replaced")

    @property
    def is_behind(self) -> bool:
        """Whether there are gangs of another spec, or too many."""
        return bool(self._outdated) or len(self._staying) > self.replicas

    @property
    def _outdated(self) -> list[PoolSlot]:
        return [slot for slot in self._staying if slot.spec != self.spec.gang]

    async def _replace_one(self, timeout_s: float) -> str | None:
        """Return why it was not possible."""
        new = self._add_slot()
        is_room_made = False
        try:
            async with asyncio.timeout(2 * self.spec.gang.start_timeout_s):
                while new.state != "ready" and not self._is_ending.is_set():
                    if new.problem == "refused" or new.record.is_exhausted:
                        await self._end_slots([new], 0.0)
                        return new.trouble
                    if new.problem == "unplaced" and not is_room_made:
                        is_room_made = True
                        logger.warning(
                            "pool %s: no room for a gang beside the old ones: one ends first", self.spec.name
                        )
                        await self._end_slots(self._outdated[-1:], timeout_s)
                        continue
                    await self._changed.wait()
        except TimeoutError:
            await self._end_slots([new], 0.0)
            return f"the new gang is not ready: {new.trouble or 'it is still starting'}"
        if not is_room_made and not self._is_ending.is_set():
            await self._end_slots(self._outdated[-1:], timeout_s)
        return None

    def _note_roll(self, state: Roll, text: str) -> None:
        self._roll = state, text
        self.keep_event("update", f"{state}: {text}")
        log = logger.warning if state == "stopped" else logger.info
        log("update of pool %s %s: %s", self.spec.name, state, text)
        self._note_change()

    # ---- gangs of another pool

    async def release(self, gang_id: str | None, timeout_s: float) -> PoolGang:
        """Withdraw a gang, the newest unless one is named, and give it away running once its work has ended. The pool
        then wants one gang less.

        Raises:
            ValueError: There is no such gang that is ready.
            NotReady: It still had requests after `timeout_s`; it serves on here.
            WorkerLost: It was lost meanwhile.
        """
        slots = [slot for slot in self._staying if slot.state == "ready" and slot.gang is not None]
        chosen = [slot for slot in slots if gang_id in (None, slot.gang and slot.gang.gang_id)]
        if not chosen:
            ids = ", ".join(slot.gang.gang_id for slot in slots if slot.gang) or "none"
            raise ValueError(f"pool {self.spec.name} has no ready gang {gang_id or ''}; ready are: {ids}")
        slot, gang = chosen[-1], chosen[-1].gang
        assert gang is not None
        slot.is_ending = True
        self.replicas -= 1
        self._set(slot, "draining")
        try:
            if not await gang.quiesce(timeout_s):
                await gang.reopen()
                raise NotReady(f"gang {gang.gang_id} still has requests after {timeout_s:g} s; it stays where it is")
            if slot.state != "draining":
                raise WorkerLost(f"gang {gang.gang_id} was lost while it drained")
        except BaseException:
            self._take_back(slot)
            raise
        slot.is_released = True
        await self._stop_slots([slot])
        self._slots.remove(slot)
        self._note_change()
        return gang

    def _take_back(self, slot: PoolSlot) -> None:
        """A gang that was to be given away stays; one that is lost is replaced."""
        self.replicas += 1
        if slot.state == "draining":
            slot.is_ending = False
            self._set(slot, "ready")
        else:
            self._slots.remove(slot)
            self._grow()

    async def adopt(self, gang: PoolGang) -> None:
        """Take a gang of another pool, which has no work. One that is lost in doing so is replaced."""
        number, self._num_slots = self._num_slots, self._num_slots + 1
        self.replicas += 1
        try:
            address = await gang.reassign(self.spec.name, number, self.spec.gang)
        except TensorweaveError as error:
            logger.warning("gang %s is replaced: %s", gang.gang_id, error.message)
            await gang.kill()
            self._add_slot(number)
        else:
            self._add_slot(number, (gang, address))

    async def drain(self, timeout_s: float) -> None:
        """Withdraw the gangs from the front ends, wait for their requests, and stop them. The pool is not used
        again."""
        self._is_ending.set()
        await self._drain_slots(self._slots, timeout_s)
        await self.stop()

    async def _drain_slots(self, slots: Sequence[PoolSlot], timeout_s: float) -> None:
        gangs = [(slot, slot.gang) for slot in slots if slot.gang is not None and slot.state == "ready"]
        for slot, _ in gangs:
            self._set(slot, "draining")
        await asyncio.gather(*(gang.drain(timeout_s) for _, gang in gangs))

    async def stop(self) -> None:
        """Kill all gangs now. Idempotent."""
        self._is_ending.set()
        await self._stop_slots(self._slots)

    async def _stop_slots(self, slots: Sequence[PoolSlot]) -> None:
        tasks = [slot.task for slot in slots if slot.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_KILL_TIMEOUT_S)

    # ---- the task of a slot

    async def _run_slot(self, slot: PoolSlot) -> None:
        try:
            while True:
                await self._run_gang(slot)
                if self._is_ending.is_set() or slot.is_ending:
                    return
                self._set(slot, "restarting" if slot.failure is None else "failed")
                await self._pause(slot.pause_s)
        finally:
            self._set(slot, "stopped")

    async def _run_gang(self, slot: PoolSlot) -> None:
        """Launch a gang, or resume one of an earlier supervisor; watch it until it ends, and kill it."""
        is_new = slot.state != "ready"
        gang = self._next_gang(slot) if slot.gang is None or is_new else slot.gang
        try:
            if is_new:
                slot.address = await gang.start()
                await self._processors.install(gang)
                await self._adapters.install(gang)
                self._note_ready(slot, gang)
            reason = await gang.watch()
            self._note_fault(slot, f"gang {gang.gang_id} ended: {reason}")
        except InsufficientResources as error:
            slot.problem = "unplaced"
            self._note_unplaced(slot, error.message, has_failed=not self._has_served)
        except NotReady as error:
            self._note_unplaced(slot, error.message)
        except ValueError as error:  # a host without the model, or a mistake in the arguments
            slot.problem = "refused"
            self._note_fault(slot, f"gang {gang.gang_id} cannot start: {error}", has_failed=not self._has_served)
        except TensorweaveError as error:
            self._note_fault(slot, error.message)
        except Exception as error:  # the supervisor's boundary: an unexpected error is a fault like any other
            logger.exception("gang %s failed", gang.gang_id)
            self._note_fault(slot, f"gang {gang.gang_id} failed: {type(error).__name__}: {error}")
        finally:
            slot.address = None
            self._note_change()
            if not slot.is_released:
                await gang.kill()

    def _next_gang(self, slot: PoolSlot) -> PoolGang:
        slot.epoch += 1
        slot.gang = self._launch(slot.spec, slot.number, slot.epoch)
        slot.problem = None
        self._set(slot, "starting")
        return slot.gang

    async def _pause(self, delay_s: float) -> None:
        """Returns early if the pool ends."""
        try:
            async with asyncio.timeout(delay_s):
                await self._is_ending.wait()
        except TimeoutError:
            return

    def _note_ready(self, slot: PoolSlot, gang: PoolGang) -> None:
        logger.info("gang %s is ready", gang.gang_id)
        self._has_served = True
        slot.record.note_ready()
        slot.failure = None
        self.keep_event("ready", f"gang {gang.gang_id} is ready", gang.gang_id)
        self._set(slot, "ready")

    def _note_unplaced(self, slot: PoolSlot, reason: str, *, has_failed: bool = False) -> None:
        slot.record.note_unplaced()
        self.keep_event("not placed", reason, _gang_id(slot))
        self._note(slot, reason, has_failed=has_failed)

    def _note_fault(self, slot: PoolSlot, reason: str, *, has_failed: bool = False) -> None:
        slot.record.note_fault()
        self._num_faults += 1
        self.keep_event("fault", reason, _gang_id(slot))
        if slot.record.is_exhausted:
            reason, has_failed = f"{slot.record.summary}, the last: {reason}", True
        self._note(slot, reason, has_failed=has_failed)

    def _note(self, slot: PoolSlot, reason: str, *, has_failed: bool = False) -> None:
        """Insufficient resources and refused arguments make a slot fail only until the pool has served: later, lost
        hosts and files may return."""
        slot.trouble = self._trouble = reason
        if has_failed:
            slot.failure = reason
        if not (self._is_ending.is_set() or slot.is_ending):
            logger.warning("pool %s: %s; next attempt in %g s", self.spec.name, reason, slot.pause_s)

    def keep_event(self, kind: EventKind, text: str, gang_id: str = "") -> None:
        """For the status page."""
        if kind in self._num_changes:
            self._num_changes[kind] += 1
        self._events.append({"time_s": time.time(), "gang_id": gang_id, "kind": kind, "text": text})

    def _set(self, slot: PoolSlot, state: GangState) -> None:
        slot.state = state
        self._note_change()

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._tell()


def _gang_id(slot: PoolSlot) -> str:
    return "" if slot.gang is None else slot.gang.gang_id
