"""`StackedExperts`: a checkpoint whose experts' tensors are stacked, under the names of one expert after the other.

gpt-oss keeps all experts of a layer in gate_up_proj [E, D, 2 I], where gates and ups alternate, down_proj [E, I, D],
gate_up_proj_bias [E, 2 I] and down_proj_bias [E, D].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor

from tensorweave.workers.models.checkpoint import Shapes
from tensorweave.workers.models.quantized.matrix_format import StoredTensors

# E experts, D hidden size, I intermediate width of an expert

_STACKED: Final = re.compile(r"(?P<experts>.*\.experts)\.(?P<kind>gate_up_proj|down_proj)(?P<bias>_bias)?")
_PHASES: Final = {"gate_proj": 0, "up_proj": 1}
"""Where each begins among the columns of gate_up_proj."""

Part = Literal["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class _Place:
    """The tensor that holds an expert's, and what of it."""

    stored: str
    number: int
    part: Part


class StackedExperts:
    """A source with names such as '….experts.3.gate_proj.weight' and '….experts.3.gate_proj.bias'. Tensors that
    are not stacked keep their names."""

    def __init__(self, source: StoredTensors) -> None:
        self._source = source
        self._places: dict[str, _Place] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in source.shapes.items():
            found = _STACKED.fullmatch(name)
            if found is None or len(shape) != (2 if found["bias"] else 3):
                shapes[name] = tuple(shape)
            else:
                shapes |= self._split(name, tuple(shape), found["experts"], found["kind"])
        self.shapes: Shapes = shapes
        self.dtypes: Mapping[str, str] = {
            name: source.dtypes[self._places[name].stored if name in self._places else name] for name in shapes
        }

    def read(self, name: str, *index: slice) -> Tensor:
        place = self._places.get(name)
        if place is None:
            return self._source.read(name, *index)
        expert = slice(place.number, place.number + 1)
        rows = index[0] if index else slice(0, self.shapes[name][0])
        if len(self.shapes[name]) == 1:
            return self._outputs(place, rows, expert)[0]
        columns = index[1] if len(index) > 1 else slice(0, self.shapes[name][1])
        return self._outputs(place, rows, expert, columns)[0].T

    def _split(self, name: str, shape: tuple[int, ...], experts: str, kind: str) -> dict[str, tuple[int, ...]]:
        """Shapes by the names of single experts; a matrix is [outputs, inputs] then."""
        parts: tuple[Part, ...] = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
        outputs, suffix = shape[-1] // len(parts), "bias" if len(shape) == 2 else "weight"
        one = (outputs, *shape[1:-1])
        found = {}
        for number in range(shape[0]):
            for part in parts:
                found[f"{experts}.{number}.{part}.{suffix}"] = one
                self._places[f"{experts}.{number}.{part}.{suffix}"] = _Place(name, number, part)
        return found

    def _outputs(self, place: _Place, rows: slice, *before: slice) -> Tensor:
        """A part of the last dimension, which has the outputs."""
        if place.part == "down_proj":
            return self._source.read(place.stored, *before, rows)
        both = self._source.read(place.stored, *before, slice(2 * rows.start, 2 * rows.stop))
        return both[..., _PHASES[place.part] :: 2]
