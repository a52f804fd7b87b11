"""`NestedTensors`: the tensors of a model that is part of a larger one, under the names that it has alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tensorweave.workers.models.checkpoint import SafetensorsDirectory, Shapes, TensorPlace


class NestedTensors:
    """A `WeightSource`. Names that begin with a key of `names` begin with what it is mapped to here; others are left
    out."""

    def __init__(self, source: SafetensorsDirectory, names: Mapping[str, str]) -> None:
        self._source = source
        self._name_of: dict[str, str] = {}
        for name in source.shapes:
            start = max((each for each in names if name.startswith(each)), key=len, default=None)
            if start is None:
                continue
            plain = names[start] + name.removeprefix(start)
            if plain in self._name_of:
                raise ValueError(f"{source.path}: tensors {self._name_of[plain]} and {name} are the same one twice")
            self._name_of[plain] = name
        self.shapes: Shapes = {plain: source.shapes[name] for plain, name in self._name_of.items()}
        self.dtypes: Mapping[str, str] = {plain: source.dtypes[name] for plain, name in self._name_of.items()}

    def read(self, name: str, *index: slice) -> Tensor:
        return self._source.read(self._name_of[name], *index)

    def places(self) -> Mapping[str, TensorPlace]:
        places = self._source.places()
        return {plain: places[name] for plain, name in self._name_of.items()}
