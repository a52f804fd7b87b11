"""What the digest of a KV block is: one 64-bit number for each layer and KV head, over the bits of its keys and values.

A multilinear hash. A plane (P tokens of one head's keys, or values) is read as 64-bit words w; each is folded to
m = w ^ (w >> 33), and the digest is the sum of m * c over keys and values, modulo 2^64, with a fixed odd pseudo-random
c for each place. Folding is one to one and an odd c has an inverse, so one changed word always changes the digest;
another change goes undetected with a probability of 2^-64 as a rule, and 2^-31 where only the highest bits of words
differ. Without the fold two flipped sign bits would cancel; folded by 32, so would the signs of a whole plane of
float32. A digest belongs to a head, so how ranks share the heads does not matter.

The last block of a prompt is partly filled: only its first `num_tokens` tokens count, as if the rest were zero.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# L layers, B blocks, K KV heads, P block size in tokens, H head dim, W 64-bit words of a plane, N blocks chosen

_WORD_BYTES: Final = 8
FOLD: Final = 33
_CHUNK_BYTES: Final = 256 << 10
"""Folded words stay in a core's L2 cache: 12 GB/s against 9 (a core of an AMD EPYC, 8 KiB planes)."""
_FIRST_DIGEST_PLACE: Final = np.uint64(1 << 40)

Words = npt.NDArray[np.uint64]


def digest_block_numpy(block_L2KPH: Tensor, num_tokens: int) -> Tensor:
    """Digests [L, K] int64 of one block in host memory, which may be a strided view of a pool."""
    words = _words(block_L2KPH, num_tokens).numpy().view(np.uint64)
    num_layers, _, num_heads, num_words = words.shape
    keys_W, values_W = plane_constants(num_words).view(np.uint64)
    digests_LK = np.empty((num_layers, num_heads), dtype=np.uint64)
    step = max(1, _CHUNK_BYTES // (words[0].size * _WORD_BYTES)) if words.size else 1
    folded = np.empty((min(step, num_layers), *words.shape[1:]), dtype=np.uint64)
    for first in range(0, num_layers, step):
        part = words[first : first + step]
        m = folded[: len(part)]
        np.right_shift(part, FOLD, out=m)
        np.bitwise_xor(m, part, out=m)
        digests_LK[first : first + step] = _dot(m[:, 0], keys_W) + _dot(m[:, 1], values_W)
    return torch.from_numpy(digests_LK.view(np.int64))


def digest_block_reference(block_L2KPH: Tensor, num_tokens: int) -> Tensor:
    """The same in torch operations, on the block's own device."""
    words_L2KW = _words(block_L2KPH, num_tokens)
    constants_2W = torch.from_numpy(plane_constants(words_L2KW.shape[-1])).to(words_L2KW.device)
    folded = words_L2KW ^ ((words_L2KW >> FOLD) & ((1 << (64 - FOLD)) - 1))
    return (folded * constants_2W[None, :, None]).sum(dim=(1, 3))


def _dot(rows_LKW: Words, constants_W: Words) -> Words:
    # einsum runs this at 30 GB/s from the cache, vecdot and matmul at 18.
    sums: Words = np.einsum("lkw,w->lk", rows_LKW, constants_W)
    return sums


def _words(block_L2KPH: Tensor, num_tokens: int) -> Tensor:
    """[L, 2, K, W] int64: the bits of each plane, zero past `num_tokens` and up to a whole word."""
    num_layers, two, num_heads, P, H = block_L2KPH.shape
    assert two == 2
    plane_bytes = P * H * block_L2KPH.itemsize
    if num_tokens == P and plane_bytes % _WORD_BYTES == 0:
        return block_L2KPH.flatten(3).view(torch.int64)
    padded = torch.zeros(
        (num_layers, 2, num_heads, -(-plane_bytes // _WORD_BYTES) * _WORD_BYTES),
        dtype=torch.uint8,
        device=block_L2KPH.device,
    )
    valid = block_L2KPH[:, :, :, :num_tokens].reshape(num_layers, 2, num_heads, -1).view(torch.uint8)
    padded[..., : valid.shape[-1]] = valid
    return padded.view(torch.int64)


@functools.lru_cache(maxsize=64)
def plane_constants(num_words: int) -> npt.NDArray[Any]:
    """[2, W] int64: odd numbers by splitmix64 (Steele, Lea and Flood, 2014), first those of keys, then of values.

    The same for each word, however many there are.
    """
    places = np.arange(num_words, dtype=np.uint64)[None, :] * np.uint64(2) + np.arange(2, dtype=np.uint64)[:, None]
    return _odd_numbers(places)


def combine_digests(digests_NLK: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """One number for each block, of its digests: their sum, each times an odd constant for its place, modulo 2^64. It
    is such a hash of the block as a digest is of two planes: one wrong digest always changes it, and a digest in
    another's place, or several wrong ones, go undetected with a probability of about 2^-63."""
    num_blocks, num_layers, num_heads = digests_NLK.shape
    flat = np.ascontiguousarray(digests_NLK).reshape(num_blocks, num_layers * num_heads)
    combined: npt.NDArray[np.int64] = flat @ _digest_constants(num_layers * num_heads)
    return combined


@functools.lru_cache(maxsize=64)
def _digest_constants(num_digests: int) -> npt.NDArray[np.int64]:
    """None of them is a constant of a plane, which would let some pairs of changes cancel."""
    constants: npt.NDArray[np.int64] = _odd_numbers(np.arange(num_digests, dtype=np.uint64) + _FIRST_DIGEST_PLACE)
    return constants


def _odd_numbers(places: npt.NDArray[np.uint64]) -> npt.NDArray[Any]:
    z = (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)
