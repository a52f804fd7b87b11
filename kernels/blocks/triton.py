"""KV blocks moved and digested by Triton kernels. Imported only where a pool is on a GPU."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensorweave.kernels.blocks.digest import FOLD, plane_constants
from tensorweave.kernels.blocks.reference import Numbers

# L layers, B blocks of the pool, K KV heads of this rank, P tokens per block, H head dim, N blocks chosen
# A run is the keys, or the values, of the chosen heads of one layer of one block: words next to each other.

_COPY_WORDS = 1024
_DIGEST_WORDS = 512


@triton.jit(do_not_specialize=["num_layers"])
def _copy_runs(
    pool_ptr, packed_ptr, ids_ptr, run_words, layer_words, block_words, half_words, first_word, num_layers,
    is_unpacking: tl.constexpr, num_words: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    half = run % 2
    layer = run // 2 % num_layers
    block_id = tl.load(ids_ptr + run // 2 // num_layers)
    in_pool = pool_ptr + layer * layer_words + block_id * block_words + half * half_words + first_word
    in_packed = packed_ptr + run * run_words
    word = tl.program_id(1) * num_words + tl.arange(0, num_words)
    mask = word < run_words
    if is_unpacking:
        tl.store(in_pool + word, tl.load(in_packed + word, mask=mask), mask=mask)
    else:
        tl.store(in_packed + word, tl.load(in_pool + word, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["num_layers", "num_heads"])
def _digest_runs(
    blocks_ptr, ids_ptr, tokens_ptr, constants_ptr, digests_ptr,
    layer_words, block_words, half_words, head_words, token_words, num_layers, num_heads,
    plane_words: tl.constexpr, fold: tl.constexpr, num_words: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    head = place % num_heads
    layer = place // num_heads % num_layers
    row = place // num_heads // num_layers
    plane = blocks_ptr + layer * layer_words + tl.load(ids_ptr + row) * block_words + head * head_words
    valid_words = tl.load(tokens_ptr + row) * token_words
    total = tl.zeros((num_words,), dtype=tl.int64)
    for half in range(2):
        for first in range(0, plane_words, num_words):
            word = first + tl.arange(0, num_words)
            bits = tl.load(plane + half * half_words + word, mask=word < valid_words, other=0)
            constants = tl.load(constants_ptr + half * plane_words + word, mask=word < valid_words, other=0)
            total += (bits ^ ((bits >> fold) & ((1 << (64 - fold)) - 1))) * constants
    tl.store(digests_ptr + place, tl.sum(total, axis=0))


def pack_blocks(pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
    _copy(pool_LB2KPH, block_ids, heads, out, is_unpacking=False)


def unpack_blocks(pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, packed: Tensor) -> None:
    _copy(pool_LB2KPH, block_ids, heads, packed, is_unpacking=True)


def digest_blocks(pool_LB2KPH: Tensor, block_ids: Numbers, num_tokens: Numbers) -> Tensor:
    assert len(block_ids) == len(num_tokens)
    num_layers, _, _, num_heads, _, H = pool_LB2KPH.shape
    words = pool_LB2KPH.flatten(4).view(torch.int64)
    digests_NLK = torch.empty((len(block_ids), num_layers, num_heads), dtype=torch.int64, device=words.device)
    if not digests_NLK.numel():
        return digests_NLK
    token_words = H * pool_LB2KPH.itemsize // words.itemsize
    with torch.cuda.device_of(words):  # type: ignore[no-untyped-call]
        _digest_runs[(digests_NLK.numel(),)](
            words, _on_device(block_ids, words), _on_device(num_tokens, words),
            _constants(words.shape[-1], words.device), digests_NLK,
            *words.stride()[:4], token_words, num_layers, num_heads,
            plane_words=words.shape[-1], fold=FOLD, num_words=_DIGEST_WORDS,
        )  # fmt: skip
    return digests_NLK


def _copy(pool_LB2KPH: Tensor, block_ids: Sequence[int], heads: range, packed: Tensor, *, is_unpacking: bool) -> None:
    words = pool_LB2KPH.flatten(4).view(torch.int64)
    layer_words, block_words, half_words, head_words, _ = words.stride()
    run_words = len(heads) * head_words
    num_runs = len(block_ids) * words.shape[0] * 2
    assert packed.numel() == num_runs * run_words * words.itemsize, "packed bytes and blocks do not fit"
    if not num_runs:
        return
    with torch.cuda.device_of(words):  # type: ignore[no-untyped-call]
        _copy_runs[(num_runs, triton.cdiv(run_words, _COPY_WORDS))](
            words, packed.view(torch.int64), _on_device(block_ids, words), run_words, layer_words, block_words,
            half_words, heads.start * head_words, words.shape[0], is_unpacking=is_unpacking, num_words=_COPY_WORDS,
        )  # fmt: skip


def _on_device(values: Numbers, like: Tensor) -> Tensor:
    if isinstance(values, Tensor):
        assert values.device == like.device
        return values
    return torch.tensor(values, dtype=torch.int64, device=like.device)


@functools.lru_cache(maxsize=16)
def _constants(num_words: int, device: torch.device) -> Tensor:
    return torch.from_numpy(plane_constants(num_words)).to(device)
