"""A pool keeps `replicas` gangs of one spec alive; it publishes where they are and replaces those that end.

    STARTING ──▶ READY ──fault──▶ RESTARTING (back-off) ──▶ STARTING          too many faults: FAILED
                   └──drain──▶ DRAINING ──▶ STOPPED

`GangPool` is plain asyncio and knows gangs by `PoolGang` only; `cluster.supervisor` runs pools in a Ray actor.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from tensorweave.cluster.errors import NotReady, TensorweaveError
from tensorweave.cluster.gang import GangSpec
from tensorweave.cluster.protocol import GangAddress

logger = logging.getLogger(__name__)

GangState = Literal["starting", "ready", "restarting", "draining", "stopped", "failed"]

_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 30.0
_KILL_TIMEOUT_S: Final = 15.0


@dataclass(frozen=True)
class PoolSpec:
    """`max_faults` faults within `fault_window_s` and the pool gives up; want of room is no fault."""

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


@dataclass(slots=True)
class _Slot:
    number: int
    epoch: int = 0
    state: GangState = "starting"
    gang: PoolGang | None = None
    address: GangAddress | None = None
    task: asyncio.Task[None] | None = None
    num_faults_running: int = field(default=0)


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
        self._slots = [_Slot(number) for number in range(spec.replicas)]
        self._faults_s: collections.deque[float] = collections.deque()
        self._failure: str | None = None
        self._trouble: str | None = None
        self._is_ending = asyncio.Event()

    def start(self) -> None:
        for slot in self._slots:
            slot.task = asyncio.create_task(self._keep(slot), name=f"pool-{self.spec.name}-{slot.number}")

    @property
    def state(self) -> PoolState:
        return PoolState(
            self.spec.name,
            self.spec.replicas,
            tuple(slot.address for slot in self._slots if slot.address is not None and slot.state == "ready"),
            tuple(slot.state for slot in self._slots),
            self._failure,
            self._trouble,
        )

    def describe(self) -> dict[str, Any]:
        gangs = [
            {"state": slot.state, "epoch": slot.epoch, **({} if slot.gang is None else slot.gang.describe())}
            for slot in self._slots
        ]
        return {
            "pool": self.spec.name,
            "role": self.spec.gang.role,
            "replicas": self.spec.replicas,
            "gangs": gangs,
            "failure": self._failure,
            "trouble": self._trouble,
        }

    async def drain(self, timeout_s: float) -> None:
        """Take the gangs from the front ends, let their requests end, stop them. The pool is over then."""
        self._is_ending.set()
        ready = [slot for slot in self._slots if slot.gang is not None and slot.state == "ready"]
        for slot in ready:
            self._set(slot, "draining")
        await asyncio.gather(*(slot.gang.drain(timeout_s) for slot in ready if slot.gang is not None))
        await self.stop()

    async def stop(self) -> None:
        """Kill all gangs now. Idempotent."""
        self._is_ending.set()
        tasks = [slot.task for slot in self._slots if slot.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_KILL_TIMEOUT_S)

    # ---- one slot's life

    async def _keep(self, slot: _Slot) -> None:
        try:
            while True:
                await self._live(slot)
                if self._is_ending.is_set() or self._failure is not None:
                    return
                self._set(slot, "restarting")
                await self._pause(slot)
        finally:
            self._set(slot, "stopped" if self._failure is None else "failed")

    async def _live(self, slot: _Slot) -> None:
        """One gang from launch to kill."""
        slot.epoch += 1
        slot.gang = gang = self._launch(slot.number, slot.epoch)
        self._set(slot, "starting")
        try:
            slot.address = await gang.start()
            slot.num_faults_running = 0
            logger.info("gang %s is ready", gang.gang_id)
            self._set(slot, "ready")
            reason = await gang.watch()
            self._note_fault(slot, f"gang {gang.gang_id} ended: {reason}")
        except NotReady as error:
            self._note_trouble(slot, error.message)
        except ValueError as error:
            self._give_up(f"gang {gang.gang_id} cannot start: {error}")
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
        self._trouble = reason
        if not self._is_ending.is_set():
            logger.warning("pool %s: %s", self.spec.name, reason)

    def _note_fault(self, slot: _Slot, reason: str) -> None:
        self._note_trouble(slot, reason)
        now_s = self._clock()
        self._faults_s.append(now_s)
        while self._faults_s[0] < now_s - self.spec.fault_window_s:
            self._faults_s.popleft()
        if len(self._faults_s) >= self.spec.max_faults:
            self._give_up(f"{len(self._faults_s)} faults within {self.spec.fault_window_s:g} s, the last: {reason}")

    def _give_up(self, reason: str) -> None:
        if not self._is_ending.is_set():
            logger.error("pool %s has failed: %s", self.spec.name, reason)
            self._failure = self._trouble = reason

    def _set(self, slot: _Slot, state: GangState) -> None:
        slot.state = state
        self._on_change()
