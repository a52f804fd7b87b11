"""Blocks copied from pool to pool, of other heads, with digests of what was copied: each form against plain copies."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.blocks.digest import digest_block_reference
from tensorweave.kernels.blocks.operations import (
    BlockOperations,
    PullInSteps,
    PullVerified,
    choose_block_operations,
    reference_block_operations,
)
from tensorweave.kernels.blocks.reference import SomeBlocks, as_blocks

LAYERS = 3
SHAPES = [
    # P, H, heads of the source and of the target, first heads, heads that are copied
    (16, 64, 3, 3, 0, 0, 3),
    (32, 128, 8, 8, 0, 0, 8),
    (16, 128, 8, 8, 0, 0, 8),
    (16, 128, 8, 4, 4, 0, 4),
    (32, 128, 2, 8, 0, 6, 2),
    (16, 64, 9, 3, 6, 0, 3),
    (8, 64, 4, 2, 1, 0, 1),
    (16, 16, 10, 10, 0, 0, 10),
    (64, 128, 4, 4, 0, 0, 4),
    (128, 128, 2, 2, 0, 0, 2),
]
Shape = tuple[int, int, int, int, int, int, int]


def pools(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    P, H, source_heads, target_heads, *_ = shape
    source, target = (torch.randn(LAYERS, 40, 2, heads, P, H, device=device) for heads in (source_heads, target_heads))
    return source.to(dtype), target.to(dtype)


def chosen(shape: Shape, source: Tensor, target: Tensor) -> tuple[SomeBlocks, SomeBlocks, list[int]]:
    P, _, _, _, first, to_first, count = shape
    ids, to_ids = random.sample(range(40), 17), random.sample(range(40), 17)
    num_tokens = [P, 1, *(random.randint(1, P) for _ in range(15))]
    heads, to_heads = range(first, first + count), range(to_first, to_first + count)
    return SomeBlocks(source, ids, heads), SomeBlocks(target, to_ids, to_heads), num_tokens


def check(pull: object, shape: Shape, dtype: torch.dtype, device: torch.device, num_sms: int = 3) -> None:
    source, target = pools(shape, dtype, device)
    come_from, go_to, num_tokens = chosen(shape, source, target)
    right = target.clone()
    for block_id, to_id in zip(come_from.block_ids, go_to.block_ids, strict=True):
        right[:, to_id, :, go_to.heads] = source[:, block_id, :, come_from.heads]
    pairs = zip(come_from.block_ids, num_tokens, strict=True)
    digests = [digest_block_reference(source[:, b][:, :, come_from.heads].contiguous(), n) for b, n in pairs]
    found = torch.zeros(17, LAYERS, len(come_from.heads), dtype=torch.int64, pin_memory=device.type == "cuda")
    assert callable(pull)
    pull(come_from, go_to, num_tokens, found, num_sms)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(target.view(torch.uint8), right.view(torch.uint8)), "these blocks, and nothing else"
    assert torch.equal(found, torch.stack(digests).cpu())


@pytest.mark.parametrize(("shape", "dtype"), [(SHAPES[0], torch.bfloat16), (SHAPES[6], torch.float32)], ids=str)
def test_on_a_cpu(shape: Shape, dtype: torch.dtype) -> None:
    cpu, operations = torch.device("cpu"), reference_block_operations()
    check(operations.pull, shape, dtype, cpu)
    check(PullInSteps(operations.pack, operations.unpack, operations.digest), shape, dtype, cpu)


def test_packed_blocks_are_a_pool() -> None:
    source, target = pools(SHAPES[0], torch.bfloat16, torch.device("cpu"))
    operations, heads = choose_block_operations(source), range(3)
    packed = torch.empty(2 * source[:, 0].nbytes, dtype=torch.uint8)
    operations.pack(source, [5, 7], heads, packed)
    found = torch.zeros(2, LAYERS, 3, dtype=torch.int64)
    packed_LB2KPH = as_blocks(packed, source, 3).transpose(0, 1)
    operations.pull(SomeBlocks(packed_LB2KPH, [0, 1], heads), SomeBlocks(target, [1, 0], heads), [16, 3], found, 1)
    assert torch.equal(target[:, [1, 0]], source[:, [5, 7]])
    assert torch.equal(found, operations.digest(source, [5, 7], [16, 3]))


def check_verified(operations: BlockOperations, device: torch.device) -> None:
    """Packed blocks into a pool in one pass; which of them are right."""
    source, target = pools((16, 64, 3, 3, 0, 0, 3), torch.bfloat16, device)
    heads, ids = range(1, 3), [5, 7, 9]
    packed = torch.empty(3 * source[:, 0, :, 1:3].numel() * 2, dtype=torch.uint8, device=device)
    operations.pack(source, ids, heads, packed)
    digests = operations.digest(source, ids, [16, 3, 16]).cpu()[:, :, 1:3]
    packed.view(3, -1)[2, 77] ^= 1
    pull_verified = PullVerified(operations.pull)
    assert pull_verified(target, [4, 0, 39], heads, packed, [16, 3, 16], digests) == [True, True, False]
    assert torch.equal(target[:, [4, 0], :, 1:3], source[:, [5, 7], :, 1:3])


def test_packed_blocks_are_verified_while_they_are_written() -> None:
    check_verified(reference_block_operations(), torch.device("cpu"))


@pytest.mark.gpu
def test_packed_blocks_are_verified_on_hopper(hopper: torch.device) -> None:
    check_verified(choose_block_operations(torch.empty(1, 1, 2, 3, 16, 64, device=hopper).bfloat16()), hopper)


@pytest.mark.gpu
@pytest.mark.parametrize("num_sms", [1, 12, 132])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_on_hopper(shape: Shape, dtype: torch.dtype, num_sms: int, hopper: torch.device) -> None:
    from tensorweave.kernels.blocks.cuda_pull import fits, pull_blocks

    source, target = pools(shape, dtype, hopper)
    if fits(source, target):
        for _ in range(3):
            check(pull_blocks, shape, dtype, hopper, num_sms)
    check(choose_block_operations(target).pull, shape, dtype, hopper, num_sms)


@pytest.mark.gpu
def test_more_blocks_than_one_launch_takes(hopper: torch.device) -> None:
    from tensorweave.kernels.blocks.cuda_pull import pull_blocks

    source, target = (torch.randn(2, 700, 2, 8, 16, 128, device=hopper).bfloat16() for _ in "ab")
    ids, to_ids, heads = torch.randperm(700).tolist(), torch.randperm(700).tolist(), range(8)
    found = torch.zeros(700, 2, 8, dtype=torch.int64, device=hopper)
    pull_blocks(SomeBlocks(source, ids, heads), SomeBlocks(target, to_ids, heads), [16] * 700, found, 12)
    assert torch.equal(target[:, to_ids], source[:, ids])
    assert torch.equal(found, choose_block_operations(source).digest(source, ids, [16] * 700))
