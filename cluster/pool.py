"""A pool keeps `replicas` gangs of one spec alive; it publishes where they are and replaces those that end.

    STARTING ──▶ READY ──fault──▶ RESTARTING (back-off) ──▶ STARTING          faults again and again: FAILED
                   └──drain──▶ DRAINING ──▶ STOPPED

`GangPool` is plain asyncio and knows gangs by `PoolGang` only; `cluster.supervisor` runs pools in a Ray actor.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from tensorweave.cluster.errors import NotReady, TensorweaveError
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.held_processors import HeldProcessors
from tensorweave.cluster.protocol import GangAddress, KvRoad, KvSource, Role

logger = logging.getLogger(__name__)

GangState = Literal["starting", "ready", "restarting", "draining", "stopped", "failed"]

_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 30.0
_KILL_TIMEOUT_S: Final = 15.0


@dataclass(frozen=True)
class PoolSpec:
    """A gang that had `max_faults` faults within `fault_window_s` is taken out of service; want of room is no fault.
    With its last gang the pool has failed."""

    name: str
    gang: GangSpec
    replicas: int = 1
    max_faults: int = 5
    fault_window_s: float = 300.0


class PoolGang(Protocol):
    """What a pool needs of a gang: `cluster.gang.Gang`, or a fake."""

    gang_id: str

    async def start(self) -> GangAddress: ...

    async def watch(self) -> str: ...

    async def measure_road(self, source: KvSource) -> KvRoad: ...

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...

    async def kill(self) -> None: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class PoolState:
    """What a pool tells the front ends. `failure`: why it has given up, if so; `trouble`: what last went wrong."""

    name: str
    replicas: int
    addresses: tuple[GangAddress, ...]
    states: tuple[GangState, ...]
    failure: str | None = None
    trouble: str | None = None
    role: Role = "both"


@dataclass(slots=True, eq=False)
class _Slot:
    """One gang's place. `failure`: why it is out of service; `trouble`: what last went wrong."""

    number: int
    epoch: int = 0
    state: GangState = "starting"
    gang: PoolGang | None = None
    address: GangAddress | None = None
    task: asyncio.Task[None] | None = None
    is_ending: bool = False
    failure: str | None = None
    trouble: str | None = None
    faults_s: collections.deque[float] = field(default_factory=collections.deque)
    num_faults_running: int = 0


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
        self._failure: str | None = None
        self._trouble: str | None = None
        self._processors = HeldProcessors()
        self._is_ending = asyncio.Event()

    def start(self) -> None:
        self._grow(self.spec.replicas)

    def _grow(self, replicas: int) -> None:
        while len(self._slots) < replicas:
            slot = _Slot(self._num_slots)
            self._num_slots += 1
            self._slots.append(slot)
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
    def state(self) -> PoolState:
        return PoolState(
            self.spec.name,
            self.replicas,
            tuple(address for _, address in self.ready),
            tuple(slot.state for slot in self._slots),
            self._failure,
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
            "failure": self._failure,
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
            self._failure = None
            self._grow(len(self._slots) + replicas - len(staying))
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
                if self._is_ending.is_set() or slot.is_ending or slot.failure is not None:
                    return
                self._set(slot, "restarting")
                await self._pause(slot)
        finally:
            self._set(slot, "stopped" if slot.failure is None else "failed")

    async def _live(self, slot: _Slot) -> None:
        """One gang from launch to kill."""
        slot.epoch += 1
        slot.gang = gang = self._launch(slot.number, slot.epoch)
        self._set(slot, "starting")
        try:
            slot.address = await gang.start()
            await self._processors.equip(gang)
            slot.num_faults_running = 0
            logger.info("gang %s is ready", gang.gang_id)
            self._set(slot, "ready")
            reason = await gang.watch()
            self._note_fault(slot, f"gang {gang.gang_id} ended: {reason}")
        except NotReady as error:
            self._note_trouble(slot, error.message)
        except ValueError as error:  # another try, or another gang of this spec, would fare no better
            for other in self._slots:
                self._give_up(other, f"gang {gang.gang_id} cannot start: {error}")
        except TensorweaveError as error:
            self._note_fault(slot, error.message)
        except Exception as error:  # the supervisor's boundary: an unforeseen error is a fault like any other
            logger.exception("gang %s failed", gang.gang_id)
            self._note_fault(slot, f"gang {gang.gang_id} failed: {type(error).__name__}: {error}")
        finally:
            slot.address = None
            self._on_change()
            await gang.kill()

    async def _pause(self, slot: _Slot) -> None:
        """No pause after a first fault, then 1, 2, 4 … 30 s; ends early when the pool ends."""
        if slot.num_faults_running <= 1:
            return
        delay_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** (slot.num_faults_running - 2))
        try:
            async with asyncio.timeout(delay_s):
                await self._is_ending.wait()
        except TimeoutError:
            return

    def _note_trouble(self, slot: _Slot, reason: str) -> None:
        slot.num_faults_running += 1
        slot.trouble = self._trouble = reason
        if not (self._is_ending.is_set() or slot.is_ending):
            logger.warning("pool %s: %s", self.spec.name, reason)

    def _note_fault(self, slot: _Slot, reason: str) -> None:
        self._note_trouble(slot, reason)
        now_s = self._clock()
        slot.faults_s.append(now_s)
        while slot.faults_s[0] < now_s - self.spec.fault_window_s:
            slot.faults_s.popleft()
        if len(slot.faults_s) >= self.spec.max_faults:
            self._give_up(
                slot, f"{len(slot.faults_s)} faults within {self.spec.fault_window_s:g} s, the last: {reason}"
            )

    def _give_up(self, slot: _Slot, reason: str) -> None:
        """This slot gets no other gang; with the last slot the pool has failed."""
        if self._is_ending.is_set() or slot.is_ending or slot.failure is not None:
            return
        logger.error("pool %s: a gang is taken out of service: %s", self.spec.name, reason)
        slot.failure = self._trouble = reason
        if all(other.failure is not None for other in self._slots):
            self._failure = reason

    def _set(self, slot: _Slot, state: GangState) -> None:
        slot.state = state
        self._on_change()
