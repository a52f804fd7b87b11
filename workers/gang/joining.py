"""How a rank joins its gang's process group: network interface, rank 0's address, torch's rendezvous."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil
import torch

from tensorweave.cluster.mesh import MeshRank
from tensorweave.workers.gang.comm import Comm, start_comm
from tensorweave.workers.gang.rank_store import RankStore
from tensorweave.workers.gang.reachability import await_reachable, listening
from tensorweave.workers.gang.rendezvous import CallStore

_ADDRESS_KEY: Final = "where rank 0 listens"
_REACH_TIMEOUT_S: Final = 20.0
"""Rank 0 listens before any other rank learns its address."""


@dataclass(frozen=True, slots=True)
class Joining:
    """One rank of a gang of several. `interface_ip` is the address of this rank's host that the other ranks connect to;
    `note_phase` is told what the rank is waiting for, in words for people. `uses_host_channel`: see `start_comm`."""

    place: MeshRank
    interface_ip: str
    device: torch.device
    timeout_s: float
    note_phase: Callable[[str], None]
    uses_host_channel: bool = True

    def join(self, call: CallStore) -> Comm:
        """Return once all ranks are connected.

        Raises:
            WorkerLost: rank 0 cannot be reached, or a rank does not come in time.
        """
        _use_interface(interface_of(self.interface_ip))
        store = RankStore(call, self.timeout_s)
        with contextlib.ExitStack() as joining:
            if self.place.rank == 0:
                host, port = joining.enter_context(listening(self.interface_ip, self.place.mesh.size))
                store.set(_ADDRESS_KEY, f"{port} {host}".encode())
            else:
                self._reach_leader(store)
            self.note_phase(f"waiting for all {self.place.mesh.size} ranks to join")
            uses_host_channel = self.uses_host_channel
            return start_comm(self.place, store, self.device, self.timeout_s, uses_host_channel=uses_host_channel)

    def _reach_leader(self, store: RankStore) -> None:
        self.note_phase("asking rank 0 where it listens")
        port, host = store.get(_ADDRESS_KEY).decode().split(" ", 1)
        self.note_phase(f"connecting to rank 0 at {host}:{port}")
        who = f"rank {self.place.rank} on {self.interface_ip}"
        await_reachable(host, int(port), _REACH_TIMEOUT_S, who=who, whom="rank 0")


def interface_of(ip: str) -> str:
    """The network interface that has the address `ip`: gloo would guess one by the host's name."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == ip for address in addresses):
            return str(name)
    raise ValueError(f"no network interface of this node carries {ip}")


def _use_interface(name: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = name
    if name != "lo":
        os.environ["NCCL_SOCKET_IFNAME"] = f"={name}"
