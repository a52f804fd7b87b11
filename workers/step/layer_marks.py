"""`LayerMarks`: how far the device has come with the layers of a step that was launched, told from the engine to KV
transfer. Its Null object is `NoLayerMarks`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

_NUM_GROUPS = 8


class Mark(Protocol):
    """A point in the device's work."""

    def wait(self) -> None:
        """What the calling thread does on the device from now on comes after it."""

    def query(self) -> bool:
        """Whether the device has come to it."""


@dataclass(frozen=True, slots=True)
class LayersDone:
    """When the mark is reached, the step's keys and values of these layers are in the cache."""

    layers: range
    mark: Mark


class LayerMarks(Protocol):
    """Used by the thread that launches steps. A step begins, passes its layers one by one or all at once, and what it
    has passed is taken."""

    def begin(self) -> None: ...

    def pass_layer(self) -> None:
        """The next layer's keys and values were launched."""

    def pass_all(self) -> None: ...

    def take(self) -> list[LayersDone]:
        """All layers of the last step that was launched; nothing if it told nothing of them."""


class NoLayerMarks:
    def begin(self) -> None:
        return None

    def pass_layer(self) -> None:
        return None

    def pass_all(self) -> None:
        return None

    def take(self) -> list[LayersDone]:
        return []


class CudaLayerMarks:
    """Events on the launching thread's stream, one for each group of layers: fewer groups cost less, and more let the
    last one be smaller."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._ends = {-(-num_layers * (group + 1) // _NUM_GROUPS) for group in range(_NUM_GROUPS)}
        self._passed = 0
        self._done: list[LayersDone] = []

    def begin(self) -> None:
        self._passed, self._done = 0, []

    def pass_layer(self) -> None:
        self._passed += 1
        if self._passed in self._ends:
            self._mark(self._passed)

    def pass_all(self) -> None:
        self.begin()
        self._mark(self._num_layers)

    def take(self) -> list[LayersDone]:
        done, self._done = self._done, []
        return done if done and done[-1].layers.stop == self._num_layers else []

    def _mark(self, end: int) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        start = self._done[-1].layers.stop if self._done else 0
        self._done.append(LayersDone(range(start, end), event))
