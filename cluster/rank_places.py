"""`RankPlaces`: the processes and hosts of a gang's ranks."""

from __future__ import annotations

import collections
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import psutil
import ray

from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.ranks import RankPlace

_CREATED_TOLERANCE_S: Final = 0.1


class RankPlaces:
    """`node_ips` has every node of the cluster, including those without a rank."""

    def __init__(self, places: Sequence[RankPlace] = (), node_ips: Mapping[str, str] | None = None) -> None:
        self.places = tuple(places)
        self.node_ips = node_ips or {}
        self._num_ranks = collections.Counter(place.node_id for place in self.places)

    def ips(self) -> Iterator[str]:
        return (self.node_ips[place.node_id] for place in self.places)

    def name(self, rank: int) -> str:
        place = self.places[rank]
        return f"rank {rank} (pid {place.pid} on {self.node_ips[place.node_id]})"

    def num_ranks_beside(self, rank: int) -> int:
        """How many ranks run on this rank's host, itself included."""
        return self._num_ranks[self.places[rank].node_id]

    def scattered_stages(self, mesh: Mesh) -> list[int]:
        """The pipeline stages that have ranks on several hosts, where these share layers over the network."""
        hosts = collections.defaultdict[int, set[str]](set)
        for rank, place in zip(mesh.ranks(), self.places, strict=True):
            hosts[rank.pipeline].add(place.node_id)
        return [stage for stage, nodes in hosts.items() if mesh.pipeline > 1 and len(nodes) > 1]

    def kill_if_local(self, rank: int) -> None:
        """Kill the rank's process if it runs on our own node: Ray takes 5 s to kill a stopped process."""
        place = self.places[rank]
        if place.node_id != ray.get_runtime_context().get_node_id():
            return
        try:
            process = psutil.Process(place.pid)
            if abs(process.create_time() - place.created_s) < _CREATED_TOLERANCE_S:
                os.kill(place.pid, signal.SIGKILL)
        except (psutil.NoSuchProcess, ProcessLookupError):
            return
