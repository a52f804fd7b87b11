"""`GangStart`: what the placed ranks of a gang are told so that they join, and what may be wrong before they do."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.hosts import Hosts
from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.protocol import GangAddress, KvSource
from tensorweave.cluster.rank_actors import start_error
from tensorweave.cluster.rank_places import RankPlaces
from tensorweave.cluster.ranks import RankOrder, RankStarted
from tensorweave.cluster.versions import Versions, explain_mix


class GangStart:
    """One attempt. Call `check`, `run`, then `address_of` what `run` has returned.

    Args:
        actors: the ranks, in order; all have prepared.
        places: where they run.
    """

    def __init__(
        self, gang_id: str, epoch: int, spec: GangSpec, actors: Sequence[ActorHandle[Any]], places: RankPlaces
    ) -> None:
        self._gang_id = gang_id
        self._epoch = epoch
        self._spec = spec
        self._actors = actors
        self._places = places
        self._hosts = Hosts.choose(places.places, places.node_ips)
        self._secret = secrets.token_hex(16)
        self._kv_secret = secrets.token_hex(16)

    async def check(self) -> None:
        """Raises ValueError if another attempt would fail too."""
        await self._check_versions()
        self._check_encryption()

    async def run(self) -> list[RankStarted]:
        """Return what each rank says once all have joined. Raises a RayActorError for a rank that has died, else what
        `start_error` makes of an error."""
        orders = [self._order(rank) for rank in range(len(self._actors))]
        return list(await asyncio.gather(*(self._start_rank(rank, order) for rank, order in enumerate(orders))))

    def address_of(self, started: Sequence[RankStarted]) -> GangAddress:
        """Raises WorkerLost if the ranks differ in how they store KV."""
        leader = started[0].leader
        assert leader is not None, "rank 0 is the leader"
        return GangAddress(
            self._gang_id,
            self._epoch,
            self._spec.role,
            self._hosts.listen,
            leader.port,
            self._secret,
            leader.info,
            kv_source=self._kv_source(started),
            tls=self._spec.tls,
        )

    async def _check_versions(self) -> None:
        """Raises ValueError if a rank's host has another version of this package."""
        versions: dict[str, Versions | None] = {}
        for rank, actor in enumerate(self._actors):
            try:
                versions[self._places.name(rank)] = Versions.from_wire(await actor.versions.remote())
            except RayTaskError:  # an older version has no such method
                versions[self._places.name(rank)] = None
        if mix := explain_mix(Versions.here(), versions):
            raise ValueError(mix)

    def _check_encryption(self) -> None:
        """Raises ValueError if TLS is wanted and the ranks would send each other prompts and tokens without it."""
        addresses = sorted(set(self._places.ips()))
        if self._spec.tls is not None and not self._spec.allow_plain_gangs and len(addresses) > 1:
            raise ValueError(
                f"network.tls is set, and gang {self._gang_id} would span the hosts {', '.join(addresses)}: gloo and "
                "NCCL, which connect its ranks, do not encrypt. Place each gang on one host, or set "
                "network.allow_plain_gangs"
            )

    async def _start_rank(self, rank: int, order: RankOrder) -> RankStarted:
        """If there are several hosts, an error names the rank and host that it comes from."""
        try:
            started: RankStarted = await self._actors[rank].start.remote(order)
            return started
        except RayActorError:
            raise
        except RayError as error:
            prefix = f"{self._places.name(rank)}: " if len(self._places.node_ips) > 1 else ""
            raise start_error(self._gang_id, error, prefix) from error

    def _kv_source(self, started: Sequence[RankStarted]) -> KvSource | None:
        """Where other gangs fetch this one's KV; None if its ranks send none."""
        endpoints = tuple(rank.kv_endpoint for rank in started if rank.kv_endpoint is not None)
        if not endpoints:
            return None
        fingerprint = started[0].kv_fingerprint
        for number, rank in enumerate(started):
            if rank.kv_endpoint is None or rank.kv_fingerprint != fingerprint:
                raise WorkerLost(f"gang {self._gang_id}: ranks 0 and {number} differ in how they store KV")
        return KvSource(self._gang_id, endpoints, fingerprint, self._kv_secret)

    def _order(self, rank: int) -> RankOrder:
        spec, hosts = self._spec, self._hosts
        return RankOrder(
            gang_id=self._gang_id,
            place=MeshRank(rank, spec.mesh),
            args=spec.args,
            leader=self._actors[0] if rank else None,
            interface_ip=hosts.peers[rank],
            listen_host=hosts.listen,
            transfer_host=hosts.reached[rank],
            num_ranks_here=self._places.num_ranks_beside(rank),
            has_gpu=spec.gpus_per_rank > 0,
            start_timeout_s=spec.start_timeout_s,
            model_digest=spec.model_digest,
            secret=self._secret,
            kv_secret=self._kv_secret,
            transfer_network=spec.transfer_network,
            tls=spec.tls,
        )
