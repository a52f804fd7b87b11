"""Digests of an engine directory's bytes, computed while they are in the CPU's cache, so that every byte is checked.

BLAKE2b over multilinear hashes of pieces of 256 KiB, the same hashes as those of KV blocks (kernels/blocks/digest.py):
one changed word always changes its piece's hash. They detect damage, not tampering: whoever can write the files can
write a manifest that fits them.
"""

from __future__ import annotations

import os
from concurrent.futures import Executor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tensorweave.kernels.blocks.operations import choose_block_operations

Bytes = npt.NDArray[np.uint8]
LENGTH_BYTES: Final = 8
_WORD_BYTES: Final = 8
_SIDE: Final = 128
_PIECE_BYTES: Final = 2 * _SIDE * _SIDE * _WORD_BYTES
_RUN_BYTES: Final = 8 * _PIECE_BYTES
_DIGEST_BYTES: Final = 16


def digest_tensor(tensor: Tensor) -> str:
    data = bytes_of(tensor)
    return _digest(_hash_pieces(data), data.size)


def bytes_of(tensor: Tensor) -> Bytes:
    """The memory of a contiguous tensor on the CPU."""
    data: Bytes = tensor.view(-1).view(torch.uint8).numpy()
    return data


def digest_file(file: Path) -> str:
    with file.open("rb", buffering=0) as source:
        return _digest_start(source.fileno(), file.stat().st_size)


def digest_header(file: Path) -> str:
    """Digest of a safetensors file's header, which has shapes, offsets and (in ours) digests of its tensors."""
    with file.open("rb", buffering=0) as source:
        header_bytes = int.from_bytes(source.read(LENGTH_BYTES), "little")
        return _digest_start(source.fileno(), min(file.stat().st_size, LENGTH_BYTES + header_bytes))


def read_bytes(fileno: int, offset: int, target: Bytes, pool: Executor | None) -> str:
    """Fill `target` with the bytes at `offset`, in parallel if there is a pool. Return their digest."""
    starts = range(0, target.size, _RUN_BYTES)
    runs = [target[start : start + _RUN_BYTES] for start in starts]
    offsets = [offset + start for start in starts]
    read = partial(_read_run, fileno)
    hashes = map(read, offsets, runs) if pool is None or len(runs) < 2 else pool.map(read, offsets, runs)
    return _digest(b"".join(hashes), target.size)


def _digest_start(fileno: int, size: int) -> str:
    scratch = np.empty(min(_RUN_BYTES, size), np.uint8)
    starts = range(0, size, _RUN_BYTES)
    return _digest(b"".join(_read_run(fileno, start, scratch[: size - start]) for start in starts), size)


def _read_run(fileno: int, offset: int, run: Bytes) -> bytes:
    """Fill `run` with the bytes at `offset`. Return their hashes."""
    _fill(fileno, offset, run)
    return _hash_pieces(run)


def _fill(fileno: int, offset: int, run: Bytes) -> None:
    view = run.data
    while view:
        count = os.preadv(fileno, [view], offset)
        if not count:
            raise ValueError(f"a file of the engine directory ends at byte {offset}, before it should")
        view, offset = view[count:], offset + count


def _hash_pieces(data: Bytes) -> bytes:
    """Each piece is hashed as a KV block of one layer and head; the last one is padded with zeros."""
    num_whole = data.size // _PIECE_BYTES
    if data.size % _PIECE_BYTES:
        last = np.zeros(_PIECE_BYTES, np.uint8)
        last[: data.size % _PIECE_BYTES] = data[num_whole * _PIECE_BYTES :]
        return _hash_whole(data[: num_whole * _PIECE_BYTES]) + _hash_whole(last)
    return _hash_whole(data)


def _hash_whole(data: Bytes) -> bytes:
    num_pieces = data.size // _PIECE_BYTES
    if not num_pieces:
        return b""
    blocks = torch.from_numpy(data).view(torch.int64).view(1, num_pieces, 2, 1, _SIDE, _SIDE)
    hashes = choose_block_operations(blocks).digest(blocks, range(num_pieces), [_SIDE] * num_pieces)
    return hashes.numpy().tobytes()


def _digest(hashes: bytes, size: int) -> str:
    return blake2b(hashes + size.to_bytes(_WORD_BYTES, "little"), digest_size=_DIGEST_BYTES).hexdigest()
