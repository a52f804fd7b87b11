"""`GgufHeader`: what a GGUF file says of its model before the weights begin."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gguf import GGUFReader


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`shape` is in the order of PyTorch, rows first; the bytes of a row lie in succession. `kind` is llama.cpp's name,
    as in 'Q4_K'."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """`source` names the file in errors."""

    source: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises ValueError if it is not a whole GGUF file."""
        try:
            reader = GGUFReader(file)
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
            raise ValueError(f"{file} is not a GGUF file that can be read: {error}") from None
        tensors = {
            tensor.name: GgufTensor(
                tensor.tensor_type.name,
                tuple(int(size) for size in reversed(tensor.shape)),
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
        return cls(file.name, fields, tensors)

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def wrong(self, key: str, supported: str) -> ValueError:
        return ValueError(f"{self.source}: {key} is {str(self.fields.get(key))[:64]!r}; supported: {supported}")

    def required(self, key: str) -> Any:
        if key not in self.fields:
            raise ValueError(f"{self.source} lacks {key}")
        return self.fields[key]

    def refuse_unread(self, read: Collection[str], described: tuple[str, ...]) -> None:
        """Raises ValueError for metadata that llama.cpp may use and nobody here reads. `described` begin keys that
        only describe the file, or that others check."""
        for key, value in self.fields.items():
            if key not in read and not key.startswith(described):
                raise ValueError(f"{self.source}: {key} is {str(value)[:64]!r}, which is not supported")
