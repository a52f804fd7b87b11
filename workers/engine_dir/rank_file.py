"""The weights of one rank in an engine directory: `RankRecorder` writes its file, `RankFile` reads it.

A rank file is in safetensors format. Names are those of the checkpoint, joined by '+' if one matrix is made of several.
A matrix has two dimensions, or four if it is a `PackedWeight`. Float32 values that came from bfloat16 are stored as
bfloat16. `weight_forms` has what a quantized matrix is stored as. The metadata has every tensor's digest.
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
    GroupedFloatWeight,
    GroupedWeight,
    PackedWeight,
    QuantizedWeight,
    Weight,
    huge_pages,
    narrowed,
    pack_weight,
)
from tensorweave.workers.engine_dir.digest import LENGTH_BYTES, bytes_of, digest_tensor, read_bytes
from tensorweave.workers.engine_dir.weight_forms import FormReader, QuantizedForm, tensors_of
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
        if isinstance(head, GroupedWeight | GroupedFloatWeight):
            return self._note_form(HEAD, head)
        packed = pack_weight(embedding_VD)
        if packed is None:
            return embedding_VD
        self._tensors[HEAD] = packed.values
        return packed

    def save(self, file: Path) -> None:
        save_file(self._tensors, file, {name: digest_tensor(tensor) for name, tensor in self._tensors.items()})

    def _pack(self, name: str, weight: Weight) -> Weight:
        if not isinstance(weight, Tensor | PackedWeight):
            return self._note_form(name, weight)
        packed = weight if isinstance(weight, PackedWeight) else pack_weight(weight)
        if packed is None:
            assert isinstance(weight, Tensor)
            return self._note(name, weight)
        self._tensors[name] = packed.values
        return packed

    def _note_form(self, name: str, weight: QuantizedForm) -> QuantizedForm:
        self._tensors |= {each: tensor.contiguous() for each, tensor in tensors_of(name, weight)}
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
        return embedding_VD if isinstance(head, Tensor) else head

    def _rows(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._check_shape(name, self._place(name)["shape"], shape)
        return self._read(name).to(self._device, self._dtype)

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Weight:
        forms = FormReader(self._places.__contains__, self._read, self._dtype)
        if forms.is_form(name):
            return self._form(forms, name, shape)
        stored = self._place(name)["shape"]
        if _DTYPES[self._place(name)["dtype"]] == FP8:
            self._check_shape(name, stored, shape)
            self._check_shape(name + _SCALES, self._place(name + _SCALES)["shape"], shape[:1])
            values_NK, scales_N = (self._read(each).to(self._device) for each in (name, name + _SCALES))
            return QuantizedWeight(values_NK, scales_N, self._dtype)
        if len(stored) != _PACKED_DIMS:
            return self._rows(name, shape)
        num_outputs, num_inputs = shape
        panels, steps, panel, step = stored
        self._check_shape(name, (panels, steps * step), (-(-num_outputs // panel), num_inputs))
        packed = PackedWeight(self._read(name), num_outputs, self._dtype)
        if self._device.type == "cpu" and packed.suits():
            return packed
        return PackedWeight(packed.values.to(self._device), num_outputs, self._dtype).rows().to(self._dtype)

    def _form(self, forms: FormReader, name: str, shape: tuple[int, ...]) -> Weight:
        if self._device.type != "cpu":
            raise ValueError(f"{self._path}: {name} is quantized in a form that is for CPUs")
        weight = forms.form(name)
        self._check_shape(name, (weight.num_outputs, weight.num_inputs), shape)
        return weight

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
