"""`SteppedEngine`: an engine that goes on when told to, so that tests meet a request in the middle of its life."""

from __future__ import annotations

import threading
from typing import Any

from tensorweave.workers.fakes.fake_engine import HashStep, LateEngine
from tensorweave.workers.step.pending import StepLogits
from tests.workers.waiting import WAIT_S


class SteppedEngine(LateEngine):
    """Computes as many steps as it has been allowed, each when it is to settle; fails when told to."""

    def __init__(self, *arguments: Any, **knobs: Any) -> None:
        super().__init__(*arguments, **knobs)
        self.fails = False
        self._changed = threading.Condition()
        self._num_allowed = 0
        self._runs_free = False

    def allow(self, num_steps: int = 1) -> None:
        with self._changed:
            self._num_allowed += num_steps
            self._changed.notify_all()

    def run_free(self) -> None:
        """From now on it waits for nobody."""
        with self._changed:
            self._runs_free = True
            self._changed.notify_all()

    def compute(self, step: HashStep) -> StepLogits:
        with self._changed:
            may_go_on = self._changed.wait_for(lambda: self._runs_free or self._num_allowed, WAIT_S)
            assert may_go_on, "nobody lets the engine go on"
            self._num_allowed -= not self._runs_free
        if self.fails:
            raise RuntimeError("the engine broke")
        return super().compute(step)
