"""A link between GPUs that is far below what it should give is named with the reason."""

from __future__ import annotations

import pytest
import torch

from tensorweave.workers.transfer.expected_rate import count_nvlinks, shortfall

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("rate", "transport", "is_here", "device", "num_links", "words"),
    [
        (60e9, "ipc", True, GPU, 0, None),
        (370e9, "ipc_direct", True, GPU, 18, None),
        (60e9, "ipc_direct", True, GPU, 18, "60 GB/s over 18 NVLinks, which should carry 450"),
        (20e9, "ipc_direct", True, GPU, 0, None),
        (2e9, "ipc_direct", True, GPU, 0, "PCIe, since no NVLink is up"),
        (3e9, "tcp", True, GPU, 18, "both GPUs are in this host, but KV takes tcp"),
        (3e9, "nccl", False, GPU, 18, None),
        (1e8, "tcp", True, CPU, 0, None),
    ],
)
def test_shortfall(
    rate: float, transport: str, is_here: bool, device: torch.device, num_links: int, words: str | None
) -> None:
    reason = shortfall(rate, transport, is_here, device, num_links)
    assert reason == words if words is None else words in str(reason)


def test_a_cpu_has_no_links() -> None:
    assert count_nvlinks(CPU) == 0
