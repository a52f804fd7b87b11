"""`StepGraphs`: decode steps for padded numbers of rows, each captured once in a CUDA graph and then replayed."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """Numbers of rows that get a graph, ascending. `is_padding`: a step takes the next larger one."""

    sizes: tuple[int, ...] = ()
    is_padding: bool = True

    def padded(self, num_rows: int) -> int:
        """How many rows a step of `num_rows` is computed with."""
        at = bisect.bisect_left(self.sizes, num_rows) if self.is_padding else len(self.sizes)
        return self.sizes[at] if at < len(self.sizes) else num_rows


class StepGraphs:
    """`make_step` returns what launches the step of so many rows, over buffers of fixed address.

    Where there is no GPU, or where no sizes are given, steps are launched kernel by kernel.
    """

    def __init__(self, sizes: GraphSizes, make_step: Callable[[int], Callable[[], None]], device: torch.device) -> None:
        self._sizes = sizes
        self._make_step = make_step
        self._device = device
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._steps: dict[int, Callable[[], None]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._stream: torch.cuda.Stream | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows that have a graph, or will."""
        return self._sizes.sizes

    def padded(self, num_rows: int) -> int:
        """How many rows a step of `num_rows` is computed with."""
        return self._sizes.padded(num_rows)

    def run(self, num_padded: int) -> None:
        """Launch the step of so many rows."""
        graph = self._graphs.get(num_padded)
        if graph is not None:
            graph.replay()
            return
        step = self._steps.get(num_padded)
        if step is None:
            step = self._steps[num_padded] = self._make_step(num_padded)
        step()

    def capture_all(self, report: Callable[[int, int], None]) -> None:
        """Capture every size, the largest first. `report` is told how many of how many are done."""
        total = len(self._sizes.sizes)
        for done, size in enumerate(reversed(self._sizes.sizes)):
            report(done, total)
            self.capture(size)
        report(total, total)

    def capture(self, num_rows: int) -> None:
        """Run the step once, which compiles its kernels, then capture it. Needs a GPU."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        step = self._steps[num_rows] = self._make_step(num_rows)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            step()
            torch.cuda.synchronize(self._device)
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool)
                try:
                    step()
                finally:
                    graph.capture_end()
        self._graphs[num_rows] = graph
        graph.replay()
