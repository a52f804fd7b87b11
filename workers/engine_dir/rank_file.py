"""The weights of one rank in an engine directory: `RankRecorder` writes its file, `RankFile` reads it.

A rank file is in safetensors format. Names are those of the checkpoint, joined by '+' if one matrix is made of several.
A matrix has two dimensions, or four if it is a `PackedWeight`. Float32 values that came from bfloat16 are stored as
bfloat16. A matrix in 8-bit floats has its scales beside it; one of integers in groups has its codes under its own name,
and beside it its scales, its minimums if there are any, and its form: inputs, group size, bits, zero and bits of rows.
The metadata has every tensor's digest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from tensorweave.kernels.weights import (
    FP8,
    GroupedWeight,
    PackedWeight,
    QuantizedWeight,
    Weight,
    huge_pages,
    narrowed,
    pack_weight,
)
from tensorweave.workers.engine_dir.digest import LENGTH_BYTES, bytes_of, digest_tensor, read_bytes
from tensorweave.workers.models.rank_weights import RankWeights, TensorRows, stacked_shape
from tensorweave.workers.models.tensor_names import HEAD

Parts = Sequence[TensorRows]
_PACKED_DIMS: Final = 4
_DTYPES: Final = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": FP8,
    "U8": torch.uint8,
    "I64": torch.int64,
}
_SCALES: Final = ".scales"
_MINIMUMS: Final = ".minimums"
_FORM: Final = ".form"


class RankRecorder:
    """Passes on what `weights` returns, and records it. Matrices are packed if this machine would pack them."""

    def __init__(self, weights: RankWeights) -> None:
        self._weights = weights
        self._tensors: dict[str, Tensor] = {}

    def vector(self, name: str, size: int) -> Tensor:
        return self._note(name, self._weights.vector(name, size))

    def rows(self, parts: Parts) -> Tensor:
        return self._note(_joined(parts), self._weights.rows(parts))

    def matrix_rows(self, parts: Parts) -> Weight:
        return self._pack(_joined(parts), self._weights.matrix_rows(parts))

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Weight:
        return self._pack(name, self._weights.matrix_columns(name, shape, columns))

    def tied_head(self, embedding_VD: Tensor) -> Weight:
        """A quantized or packed head is stored beside the embedding: reading it is faster than making it again."""
        head = self._weights.tied_head(embedding_VD)
        if isinstance(head, GroupedWeight):
            return self._note_grouped(HEAD, head)
        packed = pack_weight(embedding_VD)
        if packed is None:
            return embedding_VD
        self._tensors[HEAD] = packed.values
        return packed

    def save(self, file: Path) -> None:
        save_file(self._tensors, file, {name: digest_tensor(tensor) for name, tensor in self._tensors.items()})

    def _pack(self, name: str, weight: Weight) -> Weight:
        if isinstance(weight, QuantizedWeight):
            self._tensors[name], self._tensors[name + _SCALES] = weight.values_NK, weight.scales_N
            return weight
        if isinstance(weight, GroupedWeight):
            return self._note_grouped(name, weight)
        if not isinstance(weight, Tensor | PackedWeight):
            raise ValueError(f"{name} is a {type(weight).__name__}, which engine directories do not hold")
        packed = weight if isinstance(weight, PackedWeight) else pack_weight(weight)
        if packed is None:
            assert isinstance(weight, Tensor)
            return self._note(name, weight)
        self._tensors[name] = packed.values
        return packed

    def _note_grouped(self, name: str, weight: GroupedWeight) -> GroupedWeight:
        form = (weight.num_inputs, weight.group_size, weight.bits, weight.zero, weight.row_bits)
        self._tensors[name], self._tensors[name + _SCALES] = weight.codes.contiguous(), weight.scales_NG.contiguous()
        self._tensors[name + _FORM] = torch.tensor(form, dtype=torch.int64)
        if weight.minimums_NG is not None:
            self._tensors[name + _MINIMUMS] = weight.minimums_NG.contiguous()
        return weight

    def _note(self, name: str, tensor: Tensor) -> Tensor:
        narrow = narrowed(tensor)
        self._tensors[name] = tensor if narrow is None else narrow
        return tensor


class RankFile:
    """A `RankWeights` that reads tensors straight into their final place and checks their digests meanwhile.

    Every method raises ValueError if a tensor is damaged, missing, or not what this model needs.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device, num_threads: int = 1) -> None:
        self._path = path
        self._dtype = dtype
        self._device = device
        self._file = FileIO(path)
        self._pool = ThreadPoolExecutor(num_threads, "engine-dir") if num_threads > 1 else None
        length = self._file.read(LENGTH_BYTES)
        header = self._file.read(int.from_bytes(length, "little"))
        self._first = len(length) + len(header)
        self._places: dict[str, dict[str, Any]] = json.loads(header)
        self._digests: dict[str, str] = self._places.pop("__metadata__")
        self._unread = set(self._places)
        self._staging = self._make_staging() if device.type == "cuda" else None

    def check(self) -> None:
        """Read and check every tensor, and keep none."""
        for name in self._places:
            self._read(name)

    def check_all_read(self) -> None:
        """Raises ValueError if the model that was built of this file did not ask for one of its tensors."""
        if self._unread:
            raise ValueError(
                f"{self._path} has tensors that this model does not use: {', '.join(sorted(self._unread))}"
            )

    def vector(self, name: str, size: int) -> Tensor:
        return self._rows(name, (size,))

    def rows(self, parts: Parts) -> Tensor:
        return self._rows(_joined(parts), stacked_shape(parts))

    def matrix_rows(self, parts: Parts) -> Weight:
        return self._matrix(_joined(parts), stacked_shape(parts))

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Weight:
        return self._matrix(name, (shape[0], len(columns)))

    def tied_head(self, embedding_VD: Tensor) -> Weight:
        head = self._matrix(HEAD, tuple(embedding_VD.shape)) if HEAD in self._places else embedding_VD
        return head if isinstance(head, PackedWeight | GroupedWeight) else embedding_VD

    def _rows(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._check_shape(name, self._place(name)["shape"], shape)
        return self._read(name).to(self._device, self._dtype)

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Weight:
        stored = self._place(name)["shape"]
        if _DTYPES[self._place(name)["dtype"]] == FP8:
            self._check_shape(name, stored, shape)
            self._check_shape(name + _SCALES, self._place(name + _SCALES)["shape"], shape[:1])
            values_NK, scales_N = (self._read(each).to(self._device) for each in (name, name + _SCALES))
            return QuantizedWeight(values_NK, scales_N, self._dtype)
        if name + _FORM in self._places:
            return self._grouped(name, shape)
        if len(stored) != _PACKED_DIMS:
            return self._rows(name, shape)
        num_outputs, num_inputs = shape
        panels, steps, panel, step = stored
        self._check_shape(name, (panels, steps * step), (-(-num_outputs // panel), num_inputs))
        packed = PackedWeight(self._read(name), num_outputs, self._dtype)
        if self._device.type == "cpu" and packed.suits():
            return packed
        return PackedWeight(packed.values.to(self._device), num_outputs, self._dtype).rows().to(self._dtype)

    def _grouped(self, name: str, shape: tuple[int, ...]) -> GroupedWeight:
        if self._device.type != "cpu":
            raise ValueError(f"{self._path}: {name} is of integers in groups, which are for CPUs")
        num_inputs, group_size, bits, zero, row_bits = self._read(name + _FORM).tolist()
        self._check_shape(name, (self._place(name)["shape"][0], num_inputs), shape)
        has_minimums = name + _MINIMUMS in self._places
        return GroupedWeight(
            self._read(name),
            self._read(name + _SCALES),
            self._read(name + _MINIMUMS) if has_minimums else None,
            num_inputs,
            group_size,
            bits,
            zero,
            self._dtype,
            row_bits,
        )

    def _read(self, name: str) -> Tensor:
        place = self._place(name)
        shape, start = place["shape"], place["data_offsets"][0]
        tensor = self._allocate(tuple(shape), _DTYPES[place["dtype"]])
        if read_bytes(self._file.fileno(), self._first + start, bytes_of(tensor), self._pool) != self._digests[name]:
            raise ValueError(f"{self._path} is damaged, the bytes of {name} have changed since saving")
        self._unread.discard(name)
        return tensor

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """On the CPU. For a GPU it is there only until the next tensor is read."""
        if self._staging is not None:
            return self._staging[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
        return huge_pages(shape, dtype) if len(shape) == _PACKED_DIMS else torch.empty(shape, dtype=dtype)

    def _make_staging(self) -> Tensor:
        """Pinned memory for the largest tensor. The pages of new memory would take longer than reading into them."""
        sizes = (stop - start for start, stop in (place["data_offsets"] for place in self._places.values()))
        return torch.empty(max(sizes, default=0), dtype=torch.uint8, pin_memory=True)

    def _place(self, name: str) -> dict[str, Any]:
        if name not in self._places:
            raise ValueError(f"{self._path} lacks {name}")
        return self._places[name]

    def _check_shape(self, name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
        if tuple(shape) != tuple(expected):
            raise ValueError(f"{self._path}: {name} is {list(shape)}, this model needs {list(expected)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._file.close()


def _joined(parts: Parts) -> str:
    return "+".join(part.name for part in parts)
