"""Where weights come from: a Hugging Face directory of safetensors, read slice by slice, or seeded random numbers.

A source gives names, shapes and slices and never holds a whole checkpoint; each rank asks for what it keeps. Tensors
that are missing, unexpected or of another shape are refused by name before anything is read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
_MOST_NAMED = 8


class WeightSource(Protocol):
    """Named tensors that can be read in part. `shapes` is known without reading any of them."""

    @property
    def shapes(self) -> Shapes: ...

    def read(self, name: str, *index: slice) -> Tensor:
        """The part of `name` that `index` selects, one slice a dimension, in the stored dtype, on the CPU."""
        ...


class SafetensorsDirectory:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists; memory-mapped."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = ExitStack()
        self._file_of: dict[str, Any] = {}
        try:
            for file in self._shard_files():
                handle = self._files.enter_context(safe_open(str(file), framework="pt"))
                self._file_of.update(dict.fromkeys(handle.keys(), handle))
            self.shapes: Shapes = {
                name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._file_of.items()
            }
        except SafetensorError as error:
            self.close()
            raise ValueError(f"{self.path} holds a broken safetensors file: {error}") from None
        except ValueError:
            self.close()
            raise

    def read(self, name: str, *index: slice) -> Tensor:
        part = self._file_of[name].get_slice(name)
        tensor: Tensor = part[index] if index else part[:]
        return tensor

    def _shard_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            single = self.path / "model.safetensors"
            if not single.is_file():
                raise ValueError(f"{self.path} has neither model.safetensors nor model.safetensors.index.json")
            return [single]
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} has no usable weight_map: {error!r}") from None
        files = [self.path / name for name in names]
        if absent := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{index} lists files that are not there: {', '.join(absent)}")
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
    """Weights for speed tests: seeded by tensor name, so the same for every split of a model. Norms are 1."""

    def __init__(self, shapes: Shapes, seed: int = 0, spread: float = 0.02) -> None:
        self.shapes = shapes
        self._seed = seed
        self._spread = spread

    def read(self, name: str, *index: slice) -> Tensor:
        shape = self.shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)[index]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), self._seed))
        return torch.empty(shape).normal_(0.0, self._spread, generator=generator)[index]


def check_tensors(source: WeightSource, expected: Shapes, ignored: Collection[str] = ()) -> None:
    """Refuse a source that is not exactly `expected`. A name in `ignored`, or one that ends in it, may be there too."""
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
