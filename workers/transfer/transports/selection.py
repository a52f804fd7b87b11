"""Chooses the transports of a rank, from `CacheTransceiverConfig.backend` and where its pool is."""

from __future__ import annotations

import logging
from typing import Final

from tensorweave.workers.transfer.transports.direct import DirectTransport
from tensorweave.workers.transfer.transports.host import HostTransport
from tensorweave.workers.transfer.transports.nccl_transport import NcclTransport
from tensorweave.workers.transfer.transports.same_node import SameNodeTransport
from tensorweave.workers.transfer.transports.transport import Transport
from tensorweave.workers.transfer.window import PoolWindow

logger = logging.getLogger(__name__)

DIRECT_BACKEND: Final = "IPC_DIRECT"


def make_transports(backend: str, window: PoolWindow, *, is_encrypted: bool = False) -> list[Transport]:
    """The transports, best first: a receiver takes the first of its own that reaches the sender. 'DEFAULT' is all that
    are available: same-node copies, then NCCL, then TCP. Direct copies are used where `backend` names them, alone.
    With `is_encrypted` nothing leaves the host but over TCP, which is encrypted then: NCCL cannot be.
    Raises ValueError if the requested transport is not available."""
    if backend == "TCP" or (backend == "DEFAULT" and window.device.type != "cuda"):
        return [HostTransport(window)]
    if is_encrypted and backend == "NCCL":
        raise ValueError("cache_transceiver_config.backend is 'NCCL', which does not encrypt, and network.tls is set")
    if window.device.type != "cuda":
        raise ValueError(f"cache_transceiver_config.backend is {backend!r}, but the KV cache is on a CPU")
    window.warm()
    if backend == "IPC":
        return [SameNodeTransport(window)]
    if backend == DIRECT_BACKEND:
        return [DirectTransport(window)]
    if is_encrypted:
        return [SameNodeTransport(window), HostTransport(window)]
    try:
        nccl = NcclTransport(window)
    except OSError as error:
        if backend == "NCCL":
            raise ValueError(f"cache_transceiver_config.backend is 'NCCL', but: {error}") from None
        logger.warning("KV is not sent over NCCL: %s", error)
        return [SameNodeTransport(window), HostTransport(window)]
    return [nccl] if backend == "NCCL" else [SameNodeTransport(window), nccl, HostTransport(window)]
