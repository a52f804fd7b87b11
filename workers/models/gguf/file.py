"""`GgufFile`: the tensors of a GGUF file under the names of a Hugging Face checkpoint, memory-mapped.

Opened in the directory that `store.gguf_directory` made, whose index says where each tensor lies. As a `WeightSource`
it returns plain numbers; `grouped` returns rows of a matrix in their own quantized form.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tensorweave.kernels.grouped_float_weight import GroupedFloatWeight
from tensorweave.kernels.grouped_weight import GroupedWeight, pack_nibbles
from tensorweave.workers.models.checkpoint import Shapes
from tensorweave.workers.models.gguf.blocks import KINDS

# N outputs, K inputs, B blocks

INDEX_NAME: Final = "gguf_index.json"
_LINK_NAME: Final = "model.gguf"
_PLAIN: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MXFP4: Final = "MXFP4"
_MXFP4_BYTES, _MXFP4_SIZE = 17, 32
_ROWS_AT_ONCE_ELEMENTS: Final = 1 << 24


class GgufFile:
    """`kinds` are llama.cpp's names of how a tensor is kept, as in 'Q4_K'."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError if the file is not the one that was indexed, or has tensors of a kind that is not read."""
        index = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))
        link = directory / _LINK_NAME
        self.name = link.resolve().name
        try:
            size = link.stat().st_size
        except OSError as error:
            raise ValueError(f"{link.resolve()} cannot be read: {error.strerror}") from None
        if size != index["file_bytes"]:
            raise ValueError(f"{link.resolve()} has {size} bytes, and had {index['file_bytes']} when it was indexed")
        self._entries: dict[str, dict[str, Any]] = index["tensors"]
        self.shapes: Shapes = {name: tuple(entry["shape"]) for name, entry in self._entries.items()}
        self.kinds = {name: str(entry["kind"]) for name, entry in self._entries.items()}
        known = (*_PLAIN, *KINDS, _MXFP4)
        if other := {name: kind for name, kind in self.kinds.items() if kind not in known}:
            name, kind = next(iter(other.items()))
            raise ValueError(f"{self.name}: the tensor {name} is {kind}; supported: {', '.join(known)}")
        self._bytes = torch.from_numpy(np.memmap(link, dtype=np.uint8, mode="c"))

    def is_plain(self, name: str) -> bool:
        return self.kinds[name] in _PLAIN

    def read(self, name: str, *index: slice) -> Tensor:
        """Dequantized to float32 if it is quantized."""
        rows = range(*index[0].indices(self.shapes[name][0])) if index else range(self.shapes[name][0])
        if self.is_plain(name):
            part = self._stored_rows(name, rows)
        else:
            part = self._dequantized(name, rows)
        return part[:, index[1]] if len(index) > 1 else part

    def grouped(self, name: str, rows: range, dtype: torch.dtype) -> GroupedWeight | GroupedFloatWeight:
        """Rows of a quantized matrix, exactly; they multiply rows of `dtype`."""
        raw = self._stored_rows(name, rows)
        K = self.shapes[name][1]
        if self.kinds[name] == _MXFP4:
            return _floats(raw, K, dtype)
        kind = KINDS[self.kinds[name]]
        parts = kind.unpack(raw.view(-1, kind.num_bytes))
        N = len(rows)
        minimums = parts.minimums_BS
        return GroupedWeight.of_codes(
            parts.codes_BC.reshape(N, K),
            parts.scales_BS.reshape(N, -1),
            None if minimums is None else minimums.reshape(N, -1),
            group_size=kind.group_size,
            bits=kind.bits,
            zero=kind.zero,
            dtype=dtype,
        )

    def _dequantized(self, name: str, rows: range) -> Tensor:
        """Some rows at a time: codes and scales take three times the memory of their result."""
        step = max(1, _ROWS_AT_ONCE_ELEMENTS // self.shapes[name][1])
        out = torch.empty(len(rows), self.shapes[name][1])
        for first in range(0, len(rows), step):
            piece = rows[first : first + step]
            out[first : first + len(piece)] = self.grouped(name, piece, torch.float32).wide_rows()
        return out

    def _stored_rows(self, name: str, rows: range) -> Tensor:
        """Rows as numbers if they are plain, as bytes otherwise."""
        entry = self._entries[name]
        first, count = entry["offset"], entry["bytes"]
        dtype = _PLAIN.get(self.kinds[name])
        stored = self._bytes[first : first + count]
        if dtype is not None:
            stored = stored.clone().view(dtype) if first % dtype.itemsize else stored.view(dtype)
        table = stored.view(self.shapes[name][0], -1) if len(self.shapes[name]) > 1 else stored
        heads = entry.get("neighbours_in_heads")
        if heads is None:
            return table[rows.start : rows.stop]
        return table[stored_places(rows, self.shapes[name][0] // heads)]


def stored_places(rows: range, head_dim: int) -> Tensor:
    """Where rows of q or k are in files whose heads have neighbours side by side: llama.cpp rotates (0, 1), (2, 3), …,
    Hugging Face (0, h/2), (1, h/2 + 1), …."""
    row = torch.arange(rows.start, rows.stop)
    head, place = row // head_dim, row % head_dim
    half, pair = place // (head_dim // 2), place % (head_dim // 2)
    return head * head_dim + 2 * pair + half


def _floats(raw: Tensor, num_inputs: int, dtype: torch.dtype) -> GroupedFloatWeight:
    """MXFP4: an exponent of 2, then 16 bytes whose lower bits have the first half of the codes."""
    blocks = raw.reshape(-1, _MXFP4_BYTES)
    codes = torch.cat([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], dim=1).view(len(raw), num_inputs)
    scales = blocks[:, 0].contiguous().view(torch.float8_e8m0fnu).float().view(len(raw), -1)
    return GroupedFloatWeight(pack_nibbles(codes), scales, num_inputs, _MXFP4_SIZE, "e2m1", dtype)
