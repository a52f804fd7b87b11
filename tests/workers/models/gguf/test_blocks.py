"""Blocks of every kind against the gguf package's own dequantization, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from tensorweave.workers.models.gguf.blocks import KINDS

_HALVES = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where the float16 of a block are, if not at its beginning alone."""


@pytest.mark.parametrize("name", KINDS)
def test_every_weight_of_random_blocks(name: str) -> None:
    kind, ggml = KINDS[name], gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[ggml] == (kind.size, kind.num_bytes)
    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (200, kind.num_bytes), dtype=np.uint8)
    for place in _HALVES.get(name, (0,)):
        blocks[:, place : place + 2] = random.standard_normal((200, 1)).astype(np.float16).view(np.uint8)
    parts = kind.unpack(torch.from_numpy(blocks))
    assert parts.codes_BC.dtype == torch.uint8
    assert int(parts.codes_BC.max()) < 2**kind.bits
    weights = (parts.codes_BC.float() - kind.zero) * parts.scales_BS.float().repeat_interleave(kind.group_size, 1)
    if parts.minimums_BS is not None:
        weights += parts.minimums_BS.float().repeat_interleave(kind.group_size, 1)
    np.testing.assert_array_equal(weights.numpy(), dequantize(blocks, ggml))
