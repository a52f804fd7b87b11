"""A pool keeps `replicas` gangs of one spec alive; it publishes where they are and replaces those that end.

    STARTING ──▶ READY ──fault──▶ RESTARTING (pause) ──▶ STARTING      faults again and again: FAILED (long pause)
                   └──drain──▶ DRAINING ──▶ STOPPED

No slot is given up for ever: a failed one is tried again after pauses that grow (`cluster.fault_record`). `GangPool` is
plain asyncio and knows gangs by `PoolGang` only; `cluster.supervisor` runs pools in a Ray actor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from tensorweave.cluster.errors import InsufficientResources, NotReady, TensorweaveError
from tensorweave.cluster.fault_record import FaultRecord
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.pool_gang import PoolGang
from tensorweave.cluster.pool_logits_processors import PoolLogitsProcessors
from tensorweave.cluster.protocol import GangAddress, Role

logger = logging.getLogger(__name__)

GangState = Literal["starting", "ready", "restarting", "draining", "stopped", "failed"]

_KILL_TIMEOUT_S: Final = 15.0
_HOPELESS_PAUSE_S: Final = 5.0


@dataclass(frozen=True)
class PoolSpec:
    """A gang that had `max_faults` faults within `fault_window_s` has failed: it is tried again, but after long pauses.
    Want of room is no fault."""

    name: str
    gang: GangSpec
    replicas: int = 1
    max_faults: int = 5
    fault_window_s: float = 300.0


@dataclass(frozen=True, slots=True)
class PoolState:
    """What a pool tells the front ends. `failure`: why none of its gangs will be ready soon, if so; `trouble`: what
    last went wrong."""

    name: str
    replicas: int
    addresses: tuple[GangAddress, ...]
    states: tuple[GangState, ...]
    failure: str | None = None
    trouble: str | None = None
    role: Role = "both"


@dataclass(slots=True, eq=False)
class _Slot:
    """One gang's place. `failure`: why it will not soon be ready; `trouble`: what last went wrong."""

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
        return max(self.record.pause_s, 0.0 if self.failure is None else _HOPELESS_PAUSE_S)


class GangPool:
    """`launch(slot, epoch)` makes a gang, not started; `on_change` is called on the event loop after every change."""

    def __init__(
        self,
        spec: PoolSpec,
        launch: Callable[[int, int], PoolGang],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self._launch = launch
        self._on_change = on_change
        self._clock = clock
        self._slots: list[_Slot] = []
        self._num_slots = 0
        self._has_served = False
        self._trouble: str | None = None
        self._processors = PoolLogitsProcessors()
        self._is_ending = asyncio.Event()

    def start(self, running: Mapping[int, tuple[PoolGang, GangAddress]] | None = None) -> None:
        """`running`: gangs that an earlier supervisor has left, by slot; the pool goes on with them."""
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
            slot.task = asyncio.create_task(self._keep(slot), name=f"pool-{self.spec.name}-{slot.number}")

    @property
    def replicas(self) -> int:
        return sum(not slot.is_ending for slot in self._slots)

    @property
    def ready(self) -> list[tuple[PoolGang, GangAddress]]:
        """The gangs that take work, and where they are."""
        return [
            (slot.gang, slot.address)
            for slot in self._slots
            if slot.state == "ready" and slot.gang is not None and slot.address is not None
        ]

    @property
    def failure(self) -> str | None:
        """The pool has failed when every slot has."""
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
        }

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None:
        """For every gang, also those to come. Raises ValueError."""
        await self._processors.give([gang for gang, _ in self.ready], processors)

    async def scale(self, replicas: int, timeout_s: float) -> None:
        """That many gangs from now on. Those too many take no new work and get `timeout_s` for what runs; the youngest
        go first, those that do not serve before those that do."""
        if replicas < 0:
            raise ValueError(f"{replicas} replicas of pool {self.spec.name}")
        staying = [slot for slot in self._slots if not slot.is_ending]
        staying.sort(key=lambda slot: (slot.state != "ready", slot.number))
        if replicas > len(staying):
            self._grow(len(self._slots) + replicas - len(staying), {})
        going = staying[replicas:]
        for slot in going:
            slot.is_ending = True
        await self._drain_slots(going, timeout_s)
        await self._stop_slots(going)
        self._slots = [slot for slot in self._slots if slot not in going]
        self._on_change()

    async def drain(self, timeout_s: float) -> None:
        """Take the gangs from the front ends, let their requests end, stop them. The pool is over then."""
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

    # ---- one slot's life

    async def _keep(self, slot: _Slot) -> None:
        try:
            while True:
                await self._live(slot)
                if self._is_ending.is_set() or slot.is_ending:
                    return
                self._set(slot, "restarting" if slot.failure is None else "failed")
                await self._pause(slot.pause_s)
        finally:
            self._set(slot, "stopped")

    async def _live(self, slot: _Slot) -> None:
        """One gang from launch, or from where an earlier supervisor left it, to kill."""
        is_new = slot.state != "ready"
        gang = self._next_gang(slot) if slot.gang is None or is_new else slot.gang
        try:
            if is_new:
                slot.address = await gang.start()
                await self._processors.equip(gang)
                self._note_ready(slot, gang)
            reason = await gang.watch()
            self._note_fault(slot, f"gang {gang.gang_id} ended: {reason}")
        except InsufficientResources as error:
            slot.record.note_trouble()
            self._note(slot, error.message, is_hopeless=not self._has_served)
        except NotReady as error:
            slot.record.note_trouble()
            self._note(slot, error.message)
        except ValueError as error:  # a host without the model, or a mistake in the arguments
            self._note_fault(slot, f"gang {gang.gang_id} cannot start: {error}", is_hopeless=not self._has_served)
        except TensorweaveError as error:
            self._note_fault(slot, error.message)
        except Exception as error:  # the supervisor's boundary: an unforeseen error is a fault like any other
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
        """Ends early when the pool ends."""
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
        self._set(slot, "ready")

    def _note_fault(self, slot: _Slot, reason: str, *, is_hopeless: bool = False) -> None:
        slot.record.note_fault()
        if slot.record.is_exhausted:
            reason, is_hopeless = f"{slot.record.summary}, the last: {reason}", True
        self._note(slot, reason, is_hopeless=is_hopeless)

    def _note(self, slot: _Slot, reason: str, *, is_hopeless: bool = False) -> None:
        """A slot without hope has failed. What befalls a gang that has not room, or refuses its arguments, counts as
        hopeless until the pool has served: later, hosts and files that went may come back."""
        slot.trouble = self._trouble = reason
        if is_hopeless:
            slot.failure = reason
        if not (self._is_ending.is_set() or slot.is_ending):
            logger.warning("pool %s: %s; next try in %g s", self.spec.name, reason, slot.pause_s)

    def _set(self, slot: _Slot, state: GangState) -> None:
        slot.state = state
        self._on_change()
