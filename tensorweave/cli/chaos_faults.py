"""The faults of `tensorweave chaos`: their names, which of them a configuration allows, and how they are injected.

A fault is prepared before its time (its process is looked up), so that it can be injected at once.
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
from tensorweave.cluster.llm_args import gang_mesh
from tensorweave.deploy.config import ServeConfig

Kind = Literal["none", "kill", "hang", "kill-router", "kill-supervisor", "drain"]

_NUM_MIDWAY: Final = 4
"""A fault is injected while this many requests are partly answered, or those of all clients if there are fewer."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`role` and `rank` name the process for "kill" (SIGKILL) and "hang" (SIGSTOP): that rank of a gang of that
    role."""

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
        """Its clients send their requests again, with the same request ids."""
        return self.kind == "kill-router"


NO_FAULT: Final = Fault("none")


@dataclass(frozen=True, slots=True)
class PreparedFault:
    """`inject` injects the fault into the process `pid`, whose gang, if it has one, must end."""

    inject: Callable[[], None]
    pid: int | None = None
    gang_id: str = ""


def possible_faults(config: ServeConfig) -> list[Fault]:
    """The faults that this service can be given."""
    faults: list[Fault] = []
    for kind in ("kill", "hang"):
        for pool in config.pools.values():
            faults += [Fault(kind, pool.role, rank) for rank in range(gang_mesh(pool).size)]
    if config.router.replicas > 1:
        faults.append(Fault("kill-router"))
    return [*dict.fromkeys(faults), Fault("kill-supervisor"), Fault("drain")]


def choose_faults(config: ServeConfig, names: str | None) -> list[Fault]:
    """The faults named, by full name or by kind ("kill,hang,drain"); all possible ones without names.

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


async def prepare(fault: Fault, service: TrialService, draws: random.Random) -> PreparedFault:
    """Find the process. Raises ServiceBroken if there is none, or it is not one of the service."""
    match fault.kind:
        case "none":
            return PreparedFault(lambda: None)
        case "drain":
            return PreparedFault(service.ask_to_stop)
        case "kill-router":
            port = draws.choice(service.ports)
            listener = await asyncio.to_thread(service.tree.listener, port)
            return _signal_fault("kill", _check_owned(listener, f"the front end at port {port}"))
        case "kill-supervisor":
            service.tree.note(service.pid)
            return _signal_fault("kill", _check_owned(service.tree.named("ray::PoolSupervisor"), "the supervisor"))
        case "kill" | "hang":
            candidates = [rank for rank in await service.ranks() if (rank.role, rank.rank) == (fault.role, fault.rank)]
            if not candidates:
                raise ServiceBroken(f"no ready gang has a {fault.role} rank {fault.rank}")
            target = draws.choice(sorted(candidates, key=lambda rank: rank.gang_id))
            service.tree.note(service.pid)
            process = _check_owned(service.tree.find(target.pid), f"{target.gang_id} rank {target.rank}")
            return _signal_fault(fault.kind, process, target.gang_id)


def _check_owned(process: psutil.Process | None, what: str) -> psutil.Process:
    if process is None:
        raise ServiceBroken(f"{what} is not a process of this service: is it on another host, or another Ray cluster?")
    return process


def _signal_fault(kind: str, process: psutil.Process, gang_id: str = "") -> PreparedFault:
    def inject() -> None:
        try:
            process.kill() if kind == "kill" else process.suspend()
        except psutil.NoSuchProcess:
            raise ServiceBroken(f"process {process.pid} ended before the fault was injected") from None

    return PreparedFault(inject, process.pid, gang_id)


async def wait_until_midway(fault: Fault, load: Load, num_clients: int, timeout_s: float) -> None:
    """Wait until enough requests are partly answered. Before a drain, which refuses new requests, wait until none is
    unanswered and at least one is partly answered. Raises ServiceBroken at the timeout."""
    count = min(_NUM_MIDWAY, num_clients)
    try:
        async with asyncio.timeout(timeout_s):
            await load.until_midway(count)
            while fault.ends_service:
                load.hold()
                await load.until_answered()
                if load.num_midway:
                    load.stop()
                    return
                load.resume()
                await load.until_midway(count)
    except TimeoutError:
        raise ServiceBroken(
            f"{fault.name}: within {timeout_s:g} s there were never {count} partly answered requests at once"
        ) from None
