"""The faults of `tensorweave chaos`: their names, which of them a configuration allows, and how each is done.

A fault is prepared (its victim is looked up) before the load reaches its moment, so that it strikes at once.
"""

from __future__ import annotations

import asyncio
import difflib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import psutil

from tensorweave.cli.trial_load import Load
from tensorweave.cli.trial_service import ServiceBroken, TrialService
from tensorweave.deploy.config import ServeConfig

Kind = Literal["none", "kill", "hang", "kill-router", "kill-supervisor", "drain"]

_NUM_MIDWAY: Final = 4
"""A fault strikes when so many requests are in the midst of their answers, or all clients' where there are fewer."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`role` and `rank` name the victims of "kill" (SIGKILL) and "hang" (SIGSTOP): that rank of a gang of that role."""

    kind: Kind
    role: str = ""
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.role}-{self.rank}" if self.role else self.kind

    @property
    def ends_service(self) -> bool:
        return self.kind == "drain"

    @property
    def breaks_connections(self) -> bool:
        """Its clients ask again, with the same request id."""
        return self.kind == "kill-router"


NO_FAULT: Final = Fault("none")


@dataclass(frozen=True, slots=True)
class Blow:
    """A fault ready to strike: `strike` does it to the process `pid`, whose gang, if it has one, must end."""

    strike: Callable[[], None]
    pid: int | None = None
    gang_id: str = ""


def possible_faults(config: ServeConfig) -> list[Fault]:
    """All that this service can be put to."""
    faults: list[Fault] = []
    for kind in ("kill", "hang"):
        for pool in config.pools.values():
            faults += [Fault(kind, pool.role, rank) for rank in range(pool.tensor_parallel_size)]
    if config.router.replicas > 1:
        faults.append(Fault("kill-router"))
    return [*dict.fromkeys(faults), Fault("kill-supervisor"), Fault("drain")]


def choose_faults(config: ServeConfig, names: str | None) -> list[Fault]:
    """Those named, by full name or by kind ("kill,hang,drain"); all that are possible where none is.

    Raises:
        ValueError: an unknown name; the message has the nearest and all.
    """
    possible = possible_faults(config)
    if names is None:
        return possible
    chosen: dict[Fault, None] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        found = [fault for fault in (*possible, NO_FAULT) if name in (fault.name, fault.kind)]
        if not found:
            raise ValueError(_unknown(name, [fault.name for fault in possible]))
        chosen |= dict.fromkeys(found)
    if not chosen:
        raise ValueError("--faults names no fault")
    return list(chosen)


def _unknown(name: str, possible: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, possible, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"this service knows no fault {name!r}{hint} It has: {', '.join(possible)}, none"


async def prepare(fault: Fault, service: TrialService, draws: random.Random) -> Blow:
    """Find the victim. Raises ServiceBroken where there is none, or none that is ours to kill."""
    match fault.kind:
        case "none":
            return Blow(lambda: None)
        case "drain":
            return Blow(service.ask_to_stop)
        case "kill-router":
            port = draws.choice(service.ports)
            return _deadly("kill", _ours(await asyncio.to_thread(service.tree.listener, port), f"door {port}"))
        case "kill-supervisor":
            service.tree.note(service.pid)
            return _deadly("kill", _ours(service.tree.named("ray::PoolSupervisor"), "the supervisor"))
        case "kill" | "hang":
            victims = [rank for rank in await service.ranks() if (rank.role, rank.rank) == (fault.role, fault.rank)]
            if not victims:
                raise ServiceBroken(f"no ready gang has a {fault.role} rank {fault.rank}")
            victim = draws.choice(sorted(victims, key=lambda rank: rank.gang_id))
            service.tree.note(service.pid)
            process = _ours(service.tree.find(victim.pid), f"{victim.gang_id} rank {victim.rank}")
            return _deadly(fault.kind, process, victim.gang_id)


def _ours(process: psutil.Process | None, what: str) -> psutil.Process:
    if process is None:
        raise ServiceBroken(f"{what} is no process of this service: is it on another host, or another Ray cluster?")
    return process


def _deadly(kind: str, process: psutil.Process, gang_id: str = "") -> Blow:
    def strike() -> None:
        try:
            process.kill() if kind == "kill" else process.suspend()
        except psutil.NoSuchProcess:
            raise ServiceBroken(f"process {process.pid} has ended before it was struck") from None

    return Blow(strike, process.pid, gang_id)


async def settle(fault: Fault, load: Load, num_clients: int, timeout_s: float) -> None:
    """Returns when the fault meets a service at work. Before a drain, which refuses new requests, none of them is on
    its way any more, and at least one is in the midst of its answer. Raises ServiceBroken at the timeout."""
    count = min(_NUM_MIDWAY, num_clients)
    try:
        async with asyncio.timeout(timeout_s):
            await load.until_midway(count)
            while fault.ends_service:
                load.hold()
                await load.until_heard()
                if load.num_midway:
                    load.stop()
                    return
                load.go_on()
                await load.until_midway(count)
    except TimeoutError:
        raise ServiceBroken(
            f"{fault.name}: within {timeout_s:g} s never {count} requests at once in the midst of their answers"
        ) from None
