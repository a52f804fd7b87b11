"""`CheckpointQuantization`: what a config.json says of how the checkpoint's matrices are quantized.

Which matrices are quantized is seen from the tensors that are there; what the configuration says must agree with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self

from tensorweave.workers.models.checkpoint import SafetensorsDirectory, Shapes
from tensorweave.workers.models.quantized.matrix_format import FLOATS, MatrixFormat, Stored, StoredTensors
from tensorweave.workers.models.tensor_names import EMBEDDING

_WEIGHT: Final = ".weight"
_MOST_NAMED: Final = 8
KV_SCALES: Final = (".k_scale", ".v_scale", ".kv_scale", ".output_scale")
"""Endings of scales for an FP8 KV cache. Ours has none (`check_kv_scales`)."""
_UNUSED: Final = (".input_scale", ".input_zero_point", ".activation_scale", ".q_scale", *KV_SCALES)
"""Endings of tensors that say how activations were quantized in calibration: here they are not, or row by row."""


class Names(Protocol):
    """A rule about the names of modules, as in 'model.layers.3.mlp.up_proj'."""

    def __contains__(self, module: object) -> bool: ...


@dataclass(frozen=True, slots=True)
class Components:
    """Whole parts of a module's name, in succession: 'lm_head', 'mlp.gate', 'model.layers.0'."""

    names: tuple[str, ...]

    def __contains__(self, module: object) -> bool:
        return any(f".{name}." in f".{module}." for name in self.names)


@dataclass(frozen=True, slots=True)
class Patterns:
    """Regular expressions that match the beginning of a module's name."""

    patterns: tuple[str, ...]

    def __contains__(self, module: object) -> bool:
        return any(re.match(pattern, str(module)) for pattern in self.patterns)


NO_NAMES: Final = Components(())


@dataclass(frozen=True, slots=True)
class CheckpointQuantization:
    """`method` is the name that config.json gives it. `bits` are those of one weight without its scales, in the
    narrowest format. `formats` are asked in order, each for the modules it is for."""

    method: str
    bits: int
    formats: Sequence[tuple[Names | None, MatrixFormat]] = ()
    ignored: Names = NO_NAMES

    @classmethod
    def of_formats(
        cls, method: str, formats: Sequence[tuple[Names | None, MatrixFormat]], ignored: Names = NO_NAMES
    ) -> Self:
        return cls(method, min(each.bits for _, each in formats), tuple(formats), ignored)

    def format_of(self, name: str, shape: tuple[int, ...], source: StoredTensors) -> MatrixFormat | None:
        """The format of the tensor that the model knows as `name`; None if it is kept as plain numbers."""
        module = module_of(name, shape)
        if module is None:
            return None
        for targets, each in self.formats:
            if targets is None or module in targets:
                return each if each.find(module, (shape[0], shape[1]), source) is not None else None
        return None

    def check(self, source: StoredTensors, expected: Shapes, ignored: Sequence[str] = ()) -> None:
        """Raises ValueError unless the tensors are those of a model with the plain tensors `expected`. Names that end
        with one of `ignored` may be there as well."""
        wanted: dict[str, Stored] = {}
        quantized = []
        for name, shape in expected.items():
            form, module = self.format_of(name, shape, source), module_of(name, shape)
            if form is None or module is None:
                wanted[name] = Stored.of(tuple(shape), *FLOATS)
                continue
            if module in self.ignored:
                raise ValueError(
                    f"the checkpoint's {module} is quantized, although its configuration says that it is not"
                )
            quantized.append(module)
            wanted |= form.find(module, (shape[0], shape[1]), source) or {}
        _refuse("lacks tensors", [name for name in wanted if name not in source.shapes])
        _refuse("has tensors of another shape or type", list(_differences(source, wanted)))
        endings = (*ignored, *_UNUSED)
        extra = [name for name in source.shapes if name not in wanted and not name.endswith(endings)]
        empty = {f"{module}.bias" for module in quantized}
        _refuse(
            "has tensors that this model does not use",
            [name for name in extra if name not in empty or bool(source.read(name).any())],
        )


def module_of(name: str, shape: tuple[int, ...]) -> str | None:
    """The linear layer whose matrix `name` is; None for other tensors."""
    is_matrix = name.endswith(_WEIGHT) and len(shape) == 2 and name != EMBEDDING
    return name.removesuffix(_WEIGHT) if is_matrix else None


def check_kv_scales(directory: Path) -> None:
    """Before an FP8 KV cache is used: raises ValueError if a checkpoint has scales for one, which ours would not
    apply."""
    if not any(directory.glob("model*.safetensors")):
        return
    with SafetensorsDirectory(directory, is_quantized=True) as source:
        for name in source.shapes:
            if name.endswith(KV_SCALES) and not bool((source.read(name).float() == 1).all()):
                raise ValueError(
                    f"the checkpoint's {name} scales an FP8 KV cache; kv_cache_config.dtype 'fp8' is without scales "
                    f"here: leave it 'auto', or take the tensor out of the checkpoint"
                )


def _differences(source: StoredTensors, wanted: Mapping[str, Stored]) -> Iterator[str]:
    for name, stored in wanted.items():
        shape, dtype = tuple(source.shapes[name]), source.dtypes[name]
        if shape not in stored.shapes or dtype not in stored.dtypes:
            shapes = " or ".join(str(list(each)) for each in stored.shapes)
            yield f"{name} {dtype} {list(shape)} (expected {' or '.join(stored.dtypes)} {shapes})"


def _refuse(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        raise ValueError(f"the checkpoint {what}: {', '.join(names[:_MOST_NAMED])}{more}")
