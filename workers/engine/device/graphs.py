"""`StepGraphs`: decode steps for padded numbers of rows, each captured once in a CUDA graph and then replayed."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from tensorweave.kernels.cuda.capture import GraphCapture, no_collection

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """Numbers of rows that get a graph, ascending. `is_padding`: a step takes the next larger one."""

    sizes: tuple[int, ...] = ()
    is_padding: bool = True

    def padded(self, num_rows: int) -> int:
        """How many rows a step of `num_rows` is computed with."""
        at = bisect.bisect_left(self.sizes, num_rows) if self.is_padding else len(self.sizes)
        return self.sizes[at] if at < len(self.sizes) else num_rows


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """The size of a step of decodes of which some have adapters."""

    num_rows: int


class StepGraphs(Generic[Key]):
    """`make_step` returns what launches the step of a size, over buffers of fixed address. A step that was not captured
    is launched kernel by kernel."""

    def __init__(self, make_step: Callable[[Key], Callable[[], None]], device: torch.device) -> None:
        self._make_step = make_step
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self._steps: dict[Key, Callable[[], None]] = {}
        self._capture = GraphCapture(device) if device.type == "cuda" else None

    def run(self, size: Key) -> None:
        """Launch the step of this size."""
        graph = self._graphs.get(size)
        if graph is not None:
            graph.replay()
            return
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = self._make_step(size)
        step()

    def capture_all(self, sizes: Sequence[Key], report: Callable[[int, int], None]) -> None:
        """Capture each size, the largest first: `sizes` ascend. `report` is told how many of how many are done."""
        with no_collection():
            for done, size in enumerate(reversed(sizes)):
                report(done, len(sizes))
                self.capture(size)
        report(len(sizes), len(sizes))

    def capture(self, size: Key) -> None:
        """Run the step once, which compiles its kernels, then capture it. Needs a GPU."""
        assert self._capture is not None
        step = self._steps[size] = self._make_step(size)
        with torch.no_grad():
            step()
        graph = self._graphs[size] = self._capture(step)
        graph.replay()
