"""Marks of layers that a test sets."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from tensorweave.workers.step.layer_marks import LayersDone
from tests.workers.waiting import WAIT_S


@dataclass
class TestMark:
    """Satisfies `Mark`."""

    __test__ = False

    event: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        assert self.event.wait(WAIT_S)

    def query(self) -> bool:
        return self.event.is_set()


@dataclass
class EveryLayer:
    """Satisfies `LayerMarks` for an engine that has computed a layer when it passes it."""

    num_layers: int
    num_taken: int = 0
    _done: list[LayersDone] = field(default_factory=list)

    def begin(self) -> None:
        self._done = []

    def pass_layer(self) -> None:
        mark, layer = TestMark(), len(self._done)
        mark.event.set()
        self._done.append(LayersDone(range(layer, layer + 1), mark))

    def pass_all(self) -> None:
        self.begin()
        for _ in range(self.num_layers):
            self.pass_layer()

    def take(self) -> list[LayersDone]:
        done, self._done = self._done, []
        self.num_taken += len(done)
        return done
