"""The start order of a rank, for tests of ranks and gangs."""

from __future__ import annotations

from typing import Any

from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.ranks import RankOrder


def make_order(**changes: Any) -> RankOrder:
    """An order for the only rank of a gang, on loopback, with these fields."""
    fields: dict[str, Any] = {
        "gang_id": "g",
        "place": MeshRank(),
        "args": {"model": "m", "device": "cpu"},
        "leader": None,
        "interface_ip": "127.0.0.1",
        "listen_host": "127.0.0.1",
        "transfer_host": "127.0.0.1",
        "num_ranks_here": 1,
        "has_gpu": False,
        "start_timeout_s": 60.0,
        "model_digest": None,
        "secret": "s",
        "kv_secret": "k",
    }
    return RankOrder(**{**fields, **changes})
