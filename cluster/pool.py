"""`GangPool` keeps `replicas` gangs of one spec running, and publishes their addresses.

It is plain asyncio and uses gangs through `PoolGang` only; `cluster.supervisor` runs pools in a Ray actor. Its
size, the spec of its gangs and which gangs are its own change while it runs: `scale`, `roll`, `release` and `adopt`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tensorweave.cluster.adapter_registry import AdapterRegistry
from tensorweave.cluster.errors import NotReady, TensorweaveError, WorkerLost
from tensorweave.cluster.fault_record import FaultRecord
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.pool_gang import PoolGang
from tensorweave.cluster.pool_history import PoolHistory, UpdateState
from tensorweave.cluster.pool_logits_processors import PoolLogitsProcessors
from tensorweave.cluster.pool_slot import PoolSlot
from tensorweave.cluster.pool_slots import PoolSlots
from tensorweave.cluster.pool_spec import PoolSpec, PoolState
from tensorweave.cluster.protocol import GangAddress

logger = logging.getLogger(__name__)


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
        self.history = PoolHistory(spec.name)
        self._clock = clock
        self._num_leaving = 0
        self._processors = PoolLogitsProcessors()
        self._adapters = adapters or AdapterRegistry()
        self._slots = PoolSlots(spec.name, launch, self._equip, self.history, on_change)

    def start(self, running: Mapping[int, tuple[PoolGang, GangAddress]] | None = None) -> None:
        """`running` are the gangs of an earlier supervisor, by slot, which the pool resumes."""
        taken = running or {}
        free = (number for number in itertools.count() if number not in taken)
        for number in sorted([*taken, *itertools.islice(free, max(0, self.replicas - len(taken)))]):
            self._add_slot(number, taken.get(number))

    async def _equip(self, gang: PoolGang) -> None:
        await self._processors.install(gang)
        await self._adapters.install(gang)

    def _add_slot(self, number: int | None = None, running: tuple[PoolGang, GangAddress] | None = None) -> PoolSlot:
        record = FaultRecord(self.spec.max_faults, self.spec.fault_window_s, self._clock)
        return self._slots.add(self.spec.gang, record, number, running)

    def _grow(self) -> None:
        while len(self._staying) < self.replicas:
            self._add_slot()

    @property
    def _staying(self) -> list[PoolSlot]:
        """The slots that are not ending; those to end first come last."""
        staying = [slot for slot in self._slots.all if not slot.is_ending]
        return sorted(staying, key=lambda slot: (slot.state != "ready", slot.spec != self.spec.gang, slot.number))

    @property
    def ready(self) -> list[tuple[PoolGang, GangAddress]]:
        """The gangs that accept requests, and their addresses."""
        return [
            (slot.gang, slot.address)
            for slot in self._slots.all
            if slot.state == "ready" and slot.gang is not None and slot.address is not None
        ]

    @property
    def size(self) -> int:
        """`replicas`, and gangs that drain for another pool, which does not count them yet."""
        return self.replicas + self._num_leaving

    @property
    def failure(self) -> str | None:
        """A pool has failed if every slot has."""
        failures = [slot.failure for slot in self._slots.all if not slot.is_ending]
        return failures[-1] if failures and None not in failures else None

    @property
    def state(self) -> PoolState:
        return PoolState(
            self.spec.name,
            self.replicas,
            tuple(address for _, address in self.ready),
            tuple(slot.state for slot in self._slots.all),
            self.failure,
            self.history.trouble,
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
            for slot in self._slots.all
        ]
        return {
            "pool": self.spec.name,
            "role": self.spec.gang.role,
            "replicas": self.replicas,
            "gangs": gangs,
            "failure": self.failure,
            **self.history.describe(),
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
            text = f"{self.replicas} to {replicas} gangs" + (f": {reason}" if reason else "")
            self.history.keep_event("scaled", text)
        self.replicas = replicas
        self._grow()
        await self._slots.end(self._staying[replicas:], timeout_s)

    async def until_served(self) -> str | None:
        """Wait for the first gang, or until it is known that there is no room for one. Return why none can start."""
        while not (self.ready or self._is_ending or any(slot.problem == "unplaced" for slot in self._slots.all)):
            if self.failure is not None:
                return self.failure
            await self._slots.until_changed()
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
        num_old = len(self._outdated)
        self._note_update("running", "gangs are replaced one after another")
        while self._outdated and not self._is_ending:
            async with turn:
                problem = await self._replace_one(timeout_s)
            if problem is not None:
                num_new = sum(slot.state == "ready" and slot.spec == spec.gang for slot in self._staying)
                self.spec = replace(spec, gang=old.gang)
                self._grow()
                self._note_update("stopped", f"{num_new} of {self.replicas} gangs are new: {problem}")
                return
        if not self._is_ending:
            await self.scale(self.replicas, timeout_s)
            self._note_update("done", f"{num_old} gangs were replaced")

    @property
    def is_behind(self) -> bool:
        """Whether there are gangs of another spec, or too many."""
        return bool(self._outdated) or len(self._staying) > self.replicas

    @property
    def _is_ending(self) -> bool:
        return self._slots.is_ending.is_set()

    @property
    def _outdated(self) -> list[PoolSlot]:
        return [slot for slot in self._staying if slot.spec != self.spec.gang]

    async def _replace_one(self, timeout_s: float) -> str | None:
        """Return why it was not possible."""
        if not self._outdated or self._is_ending:
            return None
        new = self._add_slot()
        is_room_made = False
        try:
            async with asyncio.timeout(2 * self.spec.gang.start_timeout_s):
                while new.state != "ready" and not (self._is_ending or new.is_ending):
                    if new.problem == "refused" or new.record.is_exhausted:
                        await self._slots.end([new], 0.0)
                        return new.trouble
                    if new.problem == "unplaced" and not is_room_made:
                        is_room_made = True
                        logger.warning("pool %s: no room for a new gang: an old one ends first", self.spec.name)
                        await self._slots.end(self._outdated[-1:], timeout_s)
                        continue
                    await self._slots.until_changed()
        except TimeoutError:
            await self._slots.end([new], 0.0)
            return f"the new gang is not ready: {new.trouble or 'it is still starting'}"
        if not (is_room_made or self._is_ending or new.is_ending):
            await self._slots.end(self._outdated[-1:], timeout_s)
        return None

    def _note_update(self, state: UpdateState, text: str) -> None:
        self.history.note_update(state, text)
        self._slots.note_change()

    # ---- gangs of another pool

    async def release(self, gang_id: str | None, timeout_s: float) -> PoolGang:
        """Withdraw a gang, the newest unless one is named, and give it away running once its work has ended. The pool
        then wants one gang less.

        Raises:
            ValueError: There is no such gang that is ready and of the pool's spec.
            NotReady: It still had requests after `timeout_s`; it serves on here.
            WorkerLost: It was lost meanwhile.
        """
        slot, gang = self._find_ready(gang_id)
        slot.is_ending = True
        self.replicas -= 1
        self._num_leaving += 1
        self._slots.set_state(slot, "draining")
        try:
            if not await gang.quiesce(timeout_s):
                raise NotReady(f"gang {gang.gang_id} still has requests after {timeout_s:g} s; it stays where it is")
            if slot.state != "draining":
                raise WorkerLost(f"gang {gang.gang_id} was lost while it drained")
        except BaseException:
            self.replicas += 1
            await self._take_back(slot, gang)
            raise
        finally:
            self._num_leaving -= 1
        slot.is_released = True
        await self._slots.remove([slot])
        return gang

    def _find_ready(self, gang_id: str | None) -> tuple[PoolSlot, PoolGang]:
        """Raises ValueError."""
        able = [slot for slot in self._staying if slot.state == "ready" and slot.spec == self.spec.gang]
        chosen = [slot for slot in able if gang_id in (None, slot.gang_id)]
        if not chosen:
            ids = ", ".join(slot.gang_id for slot in able) or "none"
            raise ValueError(f"pool {self.spec.name} has no ready gang {gang_id or ''}; ready are: {ids}")
        gang = chosen[-1].gang
        assert gang is not None
        return chosen[-1], gang

    async def _take_back(self, slot: PoolSlot, gang: PoolGang) -> None:
        """A gang that was to be given away stays; one that is lost is replaced."""
        try:
            await gang.reopen()
        except WorkerLost as error:
            logger.warning("gang %s is replaced: %s", gang.gang_id, error.message)
            self._slots.set_state(slot, "stopped")
        if slot.state == "draining":
            slot.is_ending = False
            self._slots.set_state(slot, "ready")
        else:
            await self._slots.remove([slot])
            self._grow()

    async def adopt(self, gang: PoolGang) -> None:
        """Take a gang of another pool, which has no work. One that is lost in doing so is replaced."""
        number = self._slots.take_number()
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
        self._slots.is_ending.set()
        await self._slots.drain(self._slots.all, timeout_s)
        await self.stop()

    async def stop(self) -> None:
        """Kill all gangs now. Idempotent."""
        self._slots.is_ending.set()
        await self._slots.stop(self._slots.all)
