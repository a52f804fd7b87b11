"""Which lanes a rank has, from `CacheTransceiverConfig.backend` and where its pool is."""

from __future__ import annotations

import logging

from tensorweave.workers.transfer.lanes.lane import HostLane, LaneKind
from tensorweave.workers.transfer.lanes.nccl_lane import NcclLane
from tensorweave.workers.transfer.lanes.same_node import SameNodeLane
from tensorweave.workers.transfer.window import PoolWindow

logger = logging.getLogger(__name__)


def make_lanes(backend: str, window: PoolWindow) -> list[LaneKind]:
    """Best first: a taker takes the first of its own that leads to a giver. 'DEFAULT' is all there are: same-node
    copies, then NCCL, then TCP. Raises ValueError where a lane was asked for that cannot be had."""
    if backend == "TCP" or (backend == "DEFAULT" and window.device.type != "cuda"):
        return [HostLane(window)]
    if window.device.type != "cuda":
        raise ValueError(f"cache_transceiver_config.backend is {backend!r}, but the KV cache is on a CPU")
    window.warm()
    if backend == "IPC":
        return [SameNodeLane(window)]
    try:
        nccl = NcclLane(window)
    except OSError as error:
        if backend == "NCCL":
            raise ValueError(f"cache_transceiver_config.backend is 'NCCL', but: {error}") from None
        logger.warning("KV is not sent over NCCL: %s", error)
        return [SameNodeLane(window), HostLane(window)]
    return [nccl] if backend == "NCCL" else [SameNodeLane(window), nccl, HostLane(window)]
