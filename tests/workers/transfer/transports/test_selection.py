"""Which transports a rank has."""

from __future__ import annotations

import pytest
import torch

from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.transfer.transports.selection import make_transports
from tensorweave.workers.transfer.window import PoolWindow


def test_transports_of_a_cpu() -> None:
    window = PoolWindow(KVPool(2, 4, 1, 4, 8, torch.float32, torch.device("cpu")))
    assert [transport.name for transport in make_transports("DEFAULT", window)] == ["tcp"]
    assert [transport.name for transport in make_transports("TCP", window)] == ["tcp"]
    for backend in ("NCCL", "IPC", "IPC_DIRECT"):
        with pytest.raises(ValueError, match="KV cache is on a CPU"):
            make_transports(backend, window)
