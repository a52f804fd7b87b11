"""Digests of KV blocks: any changed word is seen, whatever the ranks hold, and all implementations agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorweave.kernels.blocks.digest import combine_digests, digest_block_numpy, digest_block_reference
from tensorweave.kernels.blocks.operations import choose_block_operations

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32]
SHAPES = [(3, 2, 16, 8), (1, 1, 1, 1), (2, 3, 4, 5), (30, 3, 32, 64), (1, 2, 2, 3)]


def random_block(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[L, 2, K, P, H] of random bits, NaNs and all."""
    num_layers, num_heads, P, H = shape
    size = (num_layers, 2, num_heads, P, H * dtype.itemsize)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).view(dtype)


def digest_block(block: Tensor, num_tokens: int) -> Tensor:
    """[L, K], by the form chosen for the block's device."""
    return choose_block_operations(block.unsqueeze(1)).digest(block.unsqueeze(1), [0], [num_tokens])[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_numpy_and_torch_agree(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    block = random_block(shape, dtype)
    for num_tokens in {1, shape[2] // 2 or 1, shape[2]}:
        digests = digest_block(block, num_tokens)
        assert digests.shape == (shape[0], shape[1])
        assert digests.dtype == torch.int64
        assert torch.equal(digests, digest_block_reference(block, num_tokens))
        assert torch.equal(digests, digest_block_numpy(block, num_tokens))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_one_changed_bit_changes_its_own_head_alone(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    dtype = data.draw(st.sampled_from(DTYPES))
    block = random_block(shape, dtype, seed=data.draw(st.integers(0, 9)))
    before = digest_block(block, shape[2])
    bits = block.view(torch.uint8)
    place = tuple(data.draw(st.integers(0, n - 1)) for n in bits.shape)
    bits[place] ^= 1 << data.draw(st.integers(0, 7))
    changed = (digest_block(block, shape[2]) != before).nonzero().tolist()
    assert changed == [[place[0], place[2]]]


@given(st.integers(0, 15), st.integers(0, 15), st.integers(0, 31))
@settings(max_examples=100, deadline=None)
def test_two_flips_of_the_same_bit_do_not_cancel(one: int, other: int, bit: int) -> None:
    """Bit 31 of every odd float32 is the top bit of its word: without the fold two of them would cancel."""
    block = random_block((1, 1, 16, 8), torch.float32)
    before = digest_block(block, 16)
    words = block.view(torch.int32)
    mask = torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    words[0, 0, 0, one, 1] ^= mask
    words[0, 1, 0, other, 7] ^= mask
    assert digest_block(block, 16) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_negated_keys_swapped_halves_and_exchanged_tokens_are_seen(dtype: torch.dtype) -> None:
    block = random_block((1, 1, 16, 8), dtype)
    before = digest_block(block, 16)
    for changed in (-block, block.flip(1), block.roll(1, dims=3), block.roll(1, dims=4)):
        assert digest_block(changed.contiguous(), 16) != before


def test_a_head_has_one_digest_wherever_it_is_held() -> None:
    block = random_block((3, 5, 16, 8), torch.bfloat16)
    whole = digest_block(block, 16)
    for heads in (slice(0, 1), slice(1, 4), slice(2, 5)):
        part = block[:, :, heads]
        assert torch.equal(digest_block(part, 16), whole[:, heads])
        assert torch.equal(digest_block(part.contiguous(), 16), whole[:, heads])


@pytest.mark.parametrize("num_tokens", [1, 7, 15])
def test_tokens_past_the_prompt_do_not_count(num_tokens: int) -> None:
    block = random_block((2, 2, 16, 3), torch.bfloat16)
    before = digest_block(block, num_tokens)
    block[:, :, :, num_tokens:] = 1.0
    assert torch.equal(digest_block(block, num_tokens), before)
    block.view(torch.uint8)[0, 0, 0, num_tokens - 1, -1] ^= 1
    assert not torch.equal(digest_block(block, num_tokens), before)


def test_combined_digests_show_each_change_and_each_exchange() -> None:
    digests = np.random.default_rng(3).integers(-(2**63), 2**63, (4, 3, 2))
    before = combine_digests(digests)
    for bit in range(64):
        for layer, head in np.ndindex(3, 2):
            changed = digests.copy()
            changed[1, layer, head] ^= np.int64(np.uint64(1 << bit).astype(np.int64))
            assert (combine_digests(changed) != before).tolist() == [False, True, False, False]
    assert (combine_digests(digests[:, ::-1]) != before).all()
    assert (combine_digests(digests[:, :, ::-1]) != before).all()
    assert (combine_digests(digests)[:2] == combine_digests(digests[:2])).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_computes_the_same_digests(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        block = random_block(shape, dtype)
        assert torch.equal(digest_block(block.cuda(), shape[2]).cpu(), digest_block(block, shape[2]))
