"""`WeightSource`: where weights come from: a Hugging Face directory of safetensors, or seeded random numbers.

A source has names and shapes, returns slices and never holds a whole checkpoint; each rank asks for what it keeps.
Tensors that are missing, unexpected or of another shape are refused by name before any is read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
_MOST_NAMED = 8
_INDEX = "model.safetensors.index.json"
_PLAIN_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZED_DTYPES: Final = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_DTYPES: Final = _PLAIN_DTYPES | _QUANTIZED_DTYPES
_LENGTH_BYTES: Final = 8
_RANDOM_SPREAD: Final = 0.02
_ADAPTER = "adapter_config.json"


class WeightSource(Protocol):
    """Named tensors that can be read in part. Their `shapes` are known before any is read."""

    @property
    def shapes(self) -> Shapes: ...

    def read(self, name: str, *index: slice) -> Tensor:
        """The part of `name` that `index` selects, one slice per dimension, in the stored dtype; of files, on the
        CPU."""
        ...


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a whole tensor lies: its bytes, row by row, begin at `offset`."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsDirectory:
    """`model.safetensors`, or the files that `model.safetensors.index.json` lists; memory-mapped.

    `dtypes` are in safetensors' names. With `is_quantized`, tensors may be of types that need scales. A model that was
    saved without its output head, as embedding models are, has names without 'model.'; they get it here.
    """

    def __init__(self, path: str | Path, *, is_quantized: bool = False) -> None:
        self.path = Path(path)
        self.shapes: Shapes = {}
        self.dtypes: Mapping[str, str] = {}
        self._known = _DTYPES if is_quantized else _PLAIN_DTYPES
        self._prefix = ""
        self._files = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._path_of: dict[str, Path] = {}
        try:
            self._open()
        except SafetensorError as error:
            self.close()
            raise ValueError(f"{self.path} holds a broken safetensors file: {error}") from None
        except ValueError:
            self.close()
            raise

    def read(self, name: str, *index: slice) -> Tensor:
        file, stored = self._file_of[name], name.removeprefix(self._prefix)
        tensor: Tensor = file.get_slice(stored)[index] if index else file.get_tensor(stored)
        return tensor

    def places(self) -> Mapping[str, TensorPlace]:
        """The places of all tensors, for readers of their own."""
        files = {self._path_of[name] for name in self.shapes}
        return {self._prefix + name: place for file in sorted(files) for name, place in _places(file)}

    def _open(self) -> None:
        weight_map = self._weight_map()
        found: dict[str, str] = {}
        for file in sorted(set(weight_map.values())) or ["model.safetensors"]:
            handle = self._files.enter_context(safe_open(str(self.path / file), framework="pt"))
            for name in handle.keys():  # noqa: SIM118
                if name in found:
                    raise ValueError(f"{self.path}: tensor {name} is in {found[name]} and in {file}; keep one of them")
                found[name], self._file_of[name], self._path_of[name] = file, handle, self.path / file
        if moved := [name for name, file in weight_map.items() if found.get(name) != file]:
            what = "lists tensors that are not in the file it names"
            raise ValueError(f"{self.path / _INDEX} {what}: {', '.join(moved[:_MOST_NAMED])}")
        if "embed_tokens.weight" in found:
            self._prefix = "model."
            self._file_of = {self._prefix + name: handle for name, handle in self._file_of.items()}
            self._path_of = {self._prefix + name: path for name, path in self._path_of.items()}
        slices = {name: handle.get_slice(name.removeprefix(self._prefix)) for name, handle in self._file_of.items()}
        self.dtypes = {name: part.get_dtype() for name, part in slices.items()}
        if other := [name for name, dtype in self.dtypes.items() if dtype not in self._known]:
            kinds = ", ".join(f"{name} {self.dtypes[name]}" for name in other[:_MOST_NAMED])
            unknown = "no plain numbers, and config.json has no quantization_config that says what they mean"
            what = unknown if self._known is _PLAIN_DTYPES else "of other types"
            raise ValueError(f"{self.path} has tensors that are {what}: {kinds}")
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}

    def _weight_map(self) -> dict[str, str]:
        """The file of each tensor according to the index; empty if there is a single file."""
        index, single = self.path / _INDEX, self.path / "model.safetensors"
        if not index.is_file():
            if not single.is_file():
                raise ValueError(f"{self.path} has neither model.safetensors nor {_INDEX}")
            return {}
        try:
            files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
            names = sorted(set(files.values()))
            absent = [name for name in names if not (self.path / name).is_file()]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} has no usable weight_map: {error!r}") from None
        if absent or not names:
            raise ValueError(f"{index} lists files that are not there: {', '.join(absent) or 'none at all'}")
        if single.is_file() and single.name not in names:
            raise ValueError(f"{self.path} has {single.name} and an index of other files; keep one of them")
        return files

    def close(self) -> None:
        self._files.close()
        self._file_of = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RandomWeights:
    """Weights for speed tests, seeded by tensor name and so the same at every mesh size. Weights of norms are 1.

    They are made on `device` (default: the CPU), in float32; one kind of device makes other numbers than another.
    """

    def __init__(self, shapes: Shapes, device: torch.device | None = None) -> None:
        self.shapes = shapes
        self._device = device or torch.device("cpu")

    def read(self, name: str, *index: slice) -> Tensor:
        shape = self.shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self._device)[index]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        numbers = torch.empty(shape, device=self._device)
        return numbers.normal_(0.0, _RANDOM_SPREAD, generator=generator)[index]


def _places(file: Path) -> Iterator[tuple[str, TensorPlace]]:
    """From the header of a safetensors file: its length in 8 bytes, little-endian, and JSON whose offsets count from
    its end (https://github.com/huggingface/safetensors#format)."""
    with file.open("rb") as stored:
        num_bytes = int.from_bytes(stored.read(_LENGTH_BYTES), "little")
        header: dict[str, dict[str, Any]] = json.loads(stored.read(num_bytes))
    for name, entry in header.items():
        if name != "__metadata__":
            offset = _LENGTH_BYTES + num_bytes + entry["data_offsets"][0]
            yield name, TensorPlace(file, offset, _DTYPES[entry["dtype"]], tuple(entry["shape"]))


def refuse_adapters(path: Path) -> None:
    """Raises ValueError if there is an adapter beside the weights: transformers would apply it."""
    if (path / _ADAPTER).is_file():
        raise ValueError(
            f"{path} has {_ADAPTER}: adapters are not applied here; merge it into the weights, or take it away"
        )


def check_tensors(source: WeightSource, expected: Shapes, ignored: Collection[str] = ()) -> None:
    """Raises ValueError unless the tensors are exactly those `expected`. Names that end with one of `ignored` may be
    there as well."""
    _refuse("lacks tensors", [name for name in expected if name not in source.shapes])
    _refuse(
        "has tensors that this model does not use",
        [name for name in source.shapes if name not in expected and not name.endswith(tuple(ignored) or ("\0",))],
    )
    _refuse(
        "has tensors of another shape",
        [
            f"{name} {list(source.shapes[name])} (expected {list(shape)})"
            for name, shape in expected.items()
            if tuple(source.shapes[name]) != tuple(shape)
        ],
    )


def _refuse(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        raise ValueError(f"the checkpoint {what}: {', '.join(names[:_MOST_NAMED])}{more}")
