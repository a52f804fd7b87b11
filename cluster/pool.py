"""`GangPool` keeps `replicas` gangs of one spec running: it publishes their addresses and replaces gangs that end.

    STARTING ──▶ READY ──fault──▶ RESTARTING (pause) ──▶ STARTING      after repeated faults: FAILED (long pause)
                   └──drain──▶ DRAINING ──▶ STOPPED

No slot fails permanently: a failed one is started again after increasing pauses (`cluster.fault_record`). `GangPool` is
plain asyncio and uses gangs through `PoolGang` only; `cluster.supervisor` runs pools in a Ray actor.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from tensorweave.cluster.adapter_registry import AdapterRegistry
from tensorweave.cluster.errors import InsufficientResources, NotReady, TensorweaveError
from tensorweave.cluster.fault_record import FaultRecord
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.pool_gang import PoolGang
from tensorweave.cluster.pool_logits_processors import PoolLogitsProcessors
from tensorweave.cluster.protocol import GangAddress, Role

logger = logging.getLogger(__name__)

GangState = Literal["starting", "ready", "restarting", "draining", "stopped", "failed"]

_KILL_TIMEOUT_S: Final = 15.0
_MIN_FAILED_PAUSE_S: Final = 5.0
_NUM_EVENTS: Final = 20


@dataclass(frozen=True)
class PoolSpec:
    """After `max_faults` faults within `fault_window_s` a slot has failed: it is started again, but after long pauses.
    Insufficient resources are not a fault."""

    name: str
    gang: GangSpec
    replicas: int = 1
    max_faults: int = 5
    fault_window_s: float = 300.0


@dataclass(frozen=True, slots=True)
class PoolState:
    """What a pool publishes to front ends. `failure` is why none of its gangs will be ready soon, if that is so;
    `trouble` is the last problem."""

    name: str
    replicas: int
    addresses: tuple[GangAddress, ...]
    states: tuple[GangState, ...]
    failure: str | None = None
    trouble: str | None = None
    role: Role = "both"


@dataclass(slots=True, eq=False)
class _Slot:
    """The gangs of one slot, one after another. `failure` is why none will be ready soon; `trouble` is the last
    problem."""

    number: int
    record: FaultRecord
    epoch: int = 0
    state: GangState = "starting"
    gang: PoolGang | None = None
    address: GangAddress | None = None
    task: asyncio.Task[None] | None = None
    is_ending: bool = False
    failure: str | None = None
    trouble: str | None = None

    @property
    def pause_s(self) -> float:
        return max(self.record.pause_s, 0.0 if self.failure is None else _MIN_FAILED_PAUSE_S)


class GangPool:
    """`launch(slot, epoch)` creates a gang without starting it; `on_change` is called on the event loop after changes.
    Every gang has all `adapters` before it is ready."""

    def __init__(
        self,
        spec: PoolSpec,
        launch: Callable[[int, int], PoolGang],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        adapters: AdapterRegistry | None = None,
    ) -> None:
        self.spec = spec
        self._launch = launch
        self._on_change = on_change
        self._clock = clock
        self._slots: list[_Slot] = []
        self._num_slots = 0
        self._has_served = False
        self._trouble: str | None = None
        self._num_faults = 0
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=_NUM_EVENTS)
        self._processors = PoolLogitsProcessors()
        self._adapters = adapters or AdapterRegistry()
        self._is_ending = asyncio.Event()

    def start(self, running: Mapping[int, tuple[PoolGang, GangAddress]] | None = None) -> None:
        """`running` are the gangs of an earlier supervisor, by slot, which the pool resumes."""
        self._grow(self.spec.replicas, running or {})

    def _grow(self, replicas: int, running: Mapping[int, tuple[PoolGang, GangAddress]]) -> None:
        while len(self._slots) < replicas:
            slot = _Slot(self._num_slots, FaultRecord(self.spec.max_faults, self.spec.fault_window_s, self._clock))
            self._num_slots += 1
            self._slots.append(slot)
            if slot.number in running:
                slot.gang, slot.address = running[slot.number]
                slot.epoch = slot.address.epoch
                self._note_ready(slot, slot.gang)
            slot.task = asyncio.create_task(self._run_slot(slot), name=f"pool-{self.spec.name}-{slot.number}")

    @property
    def replicas(self) -> int:
        return sum(not slot.is_ending for slot in self._slots)

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
            "events": list(self._events),
        }

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None:
        """Set them on every gang, including future ones. Raises ValueError."""
        await self._processors.update([gang for gang, _ in self.ready], processors)

    async def scale(self, replicas: int, timeout_s: float) -> None:
        """Change the number of gangs. Surplus gangs get no new requests and `timeout_s` for the open ones; the newest
        are removed first, those that are not ready before the others."""
        if replicas < 0:
            raise ValueError(f"{replicas} replicas of pool {self.spec.name}")
        staying = [slot for slot in self._slots if not slot.is_ending]
        staying.sort(key=lambda slot: (slot.state != "ready", slot.number))
        if replicas > len(staying):
            self._grow(len(self._slots) + replicas - len(staying), {})
        removed = staying[replicas:]
        for slot in removed:
            slot.is_ending = True
        await self._drain_slots(removed, timeout_s)
        await self._stop_slots(removed)
        self._slots = [slot for slot in self._slots if slot not in removed]
        self._on_change()

    async def drain(self, timeout_s: float) -> None:
        """Withdraw the gangs from the front ends, wait for their requests, and stop them. The pool is not used
        again."""
        self._is_ending.set()
        await self._drain_slots(self._slots, timeout_s)
        await self.stop()

    async def _drain_slots(self, slots: Sequence[_Slot], timeout_s: float) -> None:
        gangs = [(slot, slot.gang) for slot in slots if slot.gang is not None and slot.state == "ready"]
        for slot, _ in gangs:
            self._set(slot, "draining")
        await asyncio.gather(*(gang.drain(timeout_s) for _, gang in gangs))

    async def stop(self) -> None:
        """Kill all gangs now. Idempotent."""
        self._is_ending.set()
        await self._stop_slots(self._slots)

    async def _stop_slots(self, slots: Sequence[_Slot]) -> None:
        tasks = [slot.task for slot in slots if slot.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_KILL_TIMEOUT_S)

    # ---- the task of a slot

    async def _run_slot(self, slot: _Slot) -> None:
        try:
            while True:
                await self._run_gang(slot)
                if self._is_ending.is_set() or slot.is_ending:
                    return
                self._set(slot, "restarting" if slot.failure is None else "failed")
                await self._pause(slot.pause_s)
        finally:
            self._set(slot, "stopped")

    async def _run_gang(self, slot: _Slot) -> None:
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
            self._note_unplaced(slot, error.message, has_failed=not self._has_served)
        except NotReady as error:
            self._note_unplaced(slot, error.message)
        except ValueError as error:  # a host without the model, or a mistake in the arguments
            self._note_fault(slot, f"gang {gang.gang_id} cannot start: {error}", has_failed=not self._has_served)
        except TensorweaveError as error:
            self._note_fault(slot, error.message)
        except Exception as error:  # the supervisor's boundary: an unexpected error is a fault like any other
            logger.exception("gang %s failed", gang.gang_id)
            self._note_fault(slot, f"gang {gang.gang_id} failed: {type(error).__name__}: {error}")
        finally:
            slot.address = None
            self._on_change()
            await gang.kill()

    def _next_gang(self, slot: _Slot) -> PoolGang:
        slot.epoch += 1
        slot.gang = self._launch(slot.number, slot.epoch)
        self._set(slot, "starting")
        return slot.gang

    async def _pause(self, delay_s: float) -> None:
        """Returns early if the pool ends."""
        try:
            async with asyncio.timeout(delay_s):
                await self._is_ending.wait()
        except TimeoutError:
            return

    def _note_ready(self, slot: _Slot, gang: PoolGang) -> None:
        logger.info("gang %s is ready", gang.gang_id)
        self._has_served = True
        slot.record.note_ready()
        slot.failure = None
        self._keep_event(slot, "ready", f"gang {gang.gang_id} is ready")
        self._set(slot, "ready")

    def _note_unplaced(self, slot: _Slot, reason: str, *, has_failed: bool = False) -> None:
        slot.record.note_unplaced()
        self._keep_event(slot, "not placed", reason)
        self._note(slot, reason, has_failed=has_failed)

    def _note_fault(self, slot: _Slot, reason: str, *, has_failed: bool = False) -> None:
        slot.record.note_fault()
        self._num_faults += 1
        self._keep_event(slot, "fault", reason)
        if slot.record.is_exhausted:
            reason, has_failed = f"{slot.record.summary}, the last: {reason}", True
        self._note(slot, reason, has_failed=has_failed)

    def _note(self, slot: _Slot, reason: str, *, has_failed: bool = False) -> None:
        """Insufficient resources and refused arguments make a slot fail only until the pool has served: later, lost
        hosts and files may return."""
        slot.trouble = self._trouble = reason
        if has_failed:
            slot.failure = reason
        if not (self._is_ending.is_set() or slot.is_ending):
            logger.warning("pool %s: %s; next attempt in %g s", self.spec.name, reason, slot.pause_s)

    def _keep_event(self, slot: _Slot, kind: str, text: str) -> None:
        """For the status page."""
        gang_id = "" if slot.gang is None else slot.gang.gang_id
        self._events.append({"time_s": time.time(), "gang_id": gang_id, "kind": kind, "text": text})

    def _set(self, slot: _Slot, state: GangState) -> None:
        slot.state = state
        self._on_change()
