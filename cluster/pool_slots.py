"""`PoolSlots`: the slots of a pool, each with a task that starts a gang, watches it, and replaces it when it ends.

    STARTING ──▶ READY ──fault──▶ RESTARTING (pause) ──▶ STARTING      after repeated faults: FAILED (long pause)
                   └──drain──▶ DRAINING ──▶ STOPPED

No slot fails permanently: a failed one is started again after increasing pauses (`cluster.fault_record`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from tensorweave.cluster.errors import InsufficientResources, NotReady, TensorweaveError
from tensorweave.cluster.fault_record import FaultRecord
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.pool_gang import PoolGang
from tensorweave.cluster.pool_history import PoolHistory
from tensorweave.cluster.pool_slot import PoolSlot
from tensorweave.cluster.pool_spec import GangState
from tensorweave.cluster.protocol import GangAddress

logger = logging.getLogger(__name__)

_KILL_TIMEOUT_S: Final = 15.0


class PoolSlots:
    """`launch(spec, slot, epoch)` creates a gang without starting it; `equip` is called with each that has started,
    before it is ready; `on_change` is called on the event loop after changes."""

    def __init__(
        self,
        pool: str,
        launch: Callable[[GangSpec, int, int], PoolGang],
        equip: Callable[[PoolGang], Awaitable[None]],
        history: PoolHistory,
        on_change: Callable[[], None],
    ) -> None:
        self.all: list[PoolSlot] = []
        self.is_ending = asyncio.Event()
        self._pool = pool
        self._launch = launch
        self._equip = equip
        self._history = history
        self._on_change = on_change
        self._changed = asyncio.Event()
        self._next_number = 0

    def add(
        self,
        spec: GangSpec,
        record: FaultRecord,
        number: int | None = None,
        running: tuple[PoolGang, GangAddress] | None = None,
    ) -> PoolSlot:
        """A slot with a running gang, or one that starts the first of its own. The number is a new one if none is
        given."""
        slot = PoolSlot(self._next_number if number is None else number, spec, record)
        self._next_number = max(self._next_number, slot.number + 1)
        self.all.append(slot)
        if running is not None:
            slot.gang, slot.address = running
            slot.epoch, slot.spec = slot.address.epoch, slot.gang.spec
            self._note_ready(slot, slot.gang)
        slot.task = asyncio.create_task(self._run(slot), name=f"pool-{self._pool}-{slot.number}")
        return slot

    def take_number(self) -> int:
        """A number for a slot that is added later."""
        self._next_number += 1
        return self._next_number - 1

    async def until_changed(self) -> None:
        await self._changed.wait()

    def set_state(self, slot: PoolSlot, state: GangState) -> None:
        slot.state = state
        self.note_change()

    def note_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._on_change()

    async def end(self, slots: Sequence[PoolSlot], timeout_s: float) -> None:
        """Drain and stop these, and remove them."""
        for slot in slots:
            slot.is_ending = True
        await self.drain(slots, timeout_s)
        await self.remove(slots)

    async def drain(self, slots: Sequence[PoolSlot], timeout_s: float) -> None:
        gangs = [(slot, slot.gang) for slot in slots if slot.gang is not None and slot.state == "ready"]
        for slot, _ in gangs:
            self.set_state(slot, "draining")
        await asyncio.gather(*(gang.drain(timeout_s) for _, gang in gangs))

    async def remove(self, slots: Sequence[PoolSlot]) -> None:
        await self.stop(slots)
        self.all = [slot for slot in self.all if slot not in slots]
        self.note_change()

    async def stop(self, slots: Sequence[PoolSlot]) -> None:
        """Kill their gangs now, except those that are given away. Idempotent."""
        tasks = [slot.task for slot in slots if slot.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_KILL_TIMEOUT_S)

    # ---- the task of a slot

    async def _run(self, slot: PoolSlot) -> None:
        try:
            while True:
                await self._run_gang(slot)
                if self.is_ending.is_set() or slot.is_ending:
                    return
                self.set_state(slot, "restarting" if slot.failure is None else "failed")
                await self._pause(slot.pause_s)
        finally:
            self.set_state(slot, "stopped")

    async def _run_gang(self, slot: PoolSlot) -> None:
        """Launch a gang, or resume one of an earlier supervisor; watch it until it ends, and kill it."""
        is_new = slot.state != "ready"
        gang = self._next_gang(slot) if slot.gang is None or is_new else slot.gang
        try:
            if is_new:
                slot.address = await gang.start()
                await self._equip(gang)
                self._note_ready(slot, gang)
            reason = await gang.watch()
            if not slot.is_ending:  # one that has drained is stopped
                self._note_fault(slot, f"gang {gang.gang_id} ended: {reason}")
        except InsufficientResources as error:
            slot.problem = "unplaced"
            self._note_unplaced(slot, error.message, has_failed=not self._history.has_served)
        except NotReady as error:
            self._note_unplaced(slot, error.message)
        except ValueError as error:  # a host without the model, or a mistake in the arguments
            slot.problem = "refused"
            reason = f"gang {gang.gang_id} cannot start: {error}"
            self._note_fault(slot, reason, has_failed=not self._history.has_served)
        except TensorweaveError as error:
            self._note_fault(slot, error.message)
        except Exception as error:  # the supervisor's boundary: an unexpected error is a fault like any other
            logger.exception("gang %s failed", gang.gang_id)
            self._note_fault(slot, f"gang {gang.gang_id} failed: {type(error).__name__}: {error}")
        finally:
            slot.address = None
            self.note_change()
            if not slot.is_released:
                await gang.kill()

    def _next_gang(self, slot: PoolSlot) -> PoolGang:
        slot.epoch += 1
        slot.gang = self._launch(slot.spec, slot.number, slot.epoch)
        slot.problem = None
        self.set_state(slot, "starting")
        return slot.gang

    async def _pause(self, delay_s: float) -> None:
        """Returns early if the pool ends."""
        try:
            async with asyncio.timeout(delay_s):
                await self.is_ending.wait()
        except TimeoutError:
            return

    def _note_ready(self, slot: PoolSlot, gang: PoolGang) -> None:
        logger.info("gang %s is ready", gang.gang_id)
        self._history.has_served = True
        slot.record.note_ready()
        slot.failure = None
        self._history.keep_event("ready", f"gang {gang.gang_id} is ready", gang.gang_id)
        self.set_state(slot, "ready")

    def _note_unplaced(self, slot: PoolSlot, reason: str, *, has_failed: bool = False) -> None:
        slot.record.note_unplaced()
        self._history.keep_event("not placed", reason, slot.gang_id)
        self._note(slot, reason, has_failed=has_failed)

    def _note_fault(self, slot: PoolSlot, reason: str, *, has_failed: bool = False) -> None:
        slot.record.note_fault()
        self._history.num_faults += 1
        self._history.keep_event("fault", reason, slot.gang_id)
        if slot.record.is_exhausted:
            reason, has_failed = f"{slot.record.summary}, the last: {reason}", True
        self._note(slot, reason, has_failed=has_failed)

    def _note(self, slot: PoolSlot, reason: str, *, has_failed: bool = False) -> None:
        """Insufficient resources and refused arguments make a slot fail only until the pool has served: later, lost
        hosts and files may return."""
        slot.trouble = self._history.trouble = reason
        if has_failed:
            slot.failure = reason
        if not (self.is_ending.is_set() or slot.is_ending):
            logger.warning("pool %s: %s; next attempt in %g s", self._pool, reason, slot.pause_s)
