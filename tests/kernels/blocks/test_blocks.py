"""KV blocks packed, unpacked and digested: the forms against the reference, bit by bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.blocks import reference
from tensorweave.kernels.blocks.digest import digest_block_numpy
from tensorweave.kernels.blocks.native import native_blocks
from tensorweave.kernels.blocks.operations import (
    BlockOperations,
    choose_block_operations,
    reference_block_operations,
)
from tests.kernels.blocks.test_digest import DTYPES, SHAPES, random_block

TORCH = reference_block_operations()
OPERATIONS = [
    pytest.param(choose_block_operations(torch.empty(1, 1, 2, 1, 1, 1)), id="native"),
    pytest.param(reference_block_operations(partial(reference.digest_each, digest_block_numpy)), id="numpy"),
    pytest.param(TORCH, id="torch"),
]


def random_pool(shape: tuple[int, int, int, int], dtype: torch.dtype, num_blocks: int = 5) -> Tensor:
    """[L, B, 2, K, P, H]"""
    blocks = [random_block(shape, dtype, seed) for seed in range(num_blocks)]
    return torch.stack([block.view(torch.uint8) for block in blocks], dim=1).view(dtype)


@pytest.mark.skipif(native_blocks() is None, reason="no compiler")
def test_the_native_form_is_chosen_on_a_cpu() -> None:
    assert choose_block_operations(torch.empty(1, 1, 2, 1, 1, 1)).pack is not reference.pack_blocks


@pytest.mark.parametrize("operations", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_many_blocks_have_the_digests_of_each(
    shape: tuple[int, int, int, int], dtype: torch.dtype, operations: BlockOperations
) -> None:
    pool, P = random_pool(shape, dtype), shape[2]
    ids, counts = [4, 0, 0, 2], [P, 1, P, max(1, P - 1)]
    digests = operations.digest(pool, ids, counts)
    assert torch.equal(digests, TORCH.digest(pool, ids, counts))
    assert operations.digest(pool, [], []).shape == (0, shape[0], shape[1])
    turned = pool.transpose(0, 1).contiguous().transpose(0, 1)  # as packed blocks are seen
    assert torch.equal(operations.digest(turned, ids, counts), digests)


@pytest.mark.parametrize("operations", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_blocks_come_back_and_touch_nothing_else(
    shape: tuple[int, int, int, int], dtype: torch.dtype, operations: BlockOperations
) -> None:
    pool, num_heads = random_pool(shape, dtype), shape[1]
    for heads in {range(num_heads), range(num_heads - 1, num_heads), range(max(1, num_heads - 1))}:
        size = 3 * pool[:, 0, :, : len(heads)].nbytes
        ours, theirs = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        operations.pack(pool, [3, 0, 4], heads, ours)
        TORCH.pack(pool, [3, 0, 4], heads, theirs)
        assert torch.equal(ours, theirs)
        one, other = pool.clone(), pool.clone()
        operations.unpack(one, [1, 4, 2], heads, ours)
        TORCH.unpack(other, [1, 4, 2], heads, theirs)
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        assert not torch.equal(one.view(torch.uint8), pool.view(torch.uint8))


@pytest.mark.parametrize("operations", OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_only_blocks_with_the_expected_digests_are_unpacked(
    shape: tuple[int, int, int, int], operations: BlockOperations
) -> None:
    pool, num_heads, P = random_pool(shape, torch.bfloat16), shape[1], shape[2]
    heads, counts = range(num_heads), [P, max(1, P - 1), P]
    packed = torch.zeros(3 * pool[:, 0].nbytes, dtype=torch.uint8)
    TORCH.pack(pool, [3, 0, 4], heads, packed)
    digests = TORCH.digest(pool, [3, 0, 4], counts)
    target = torch.zeros_like(pool)
    assert operations.unpack_verified(target, [1, 4, 2], heads, packed, counts, digests) == [True] * 3
    assert torch.equal(target[:, [1, 4, 2]].view(torch.uint8), pool[:, [3, 0, 4]].view(torch.uint8))
    assert not target[:, [0, 3]].view(torch.uint8).any()

    digests[1, -1, -1] += 1
    target = torch.zeros_like(pool)
    assert operations.unpack_verified(target, [1, 4, 2], heads, packed, counts, digests) == [True, False, True]
    assert torch.equal(target[:, [1, 2]].view(torch.uint8), pool[:, [3, 4]].view(torch.uint8))
    assert operations.unpack_verified(target, [1], heads, packed[: len(packed) // 3], [P], digests[1:2]) == [False]
