"""`CudaGraphConfig`: the part of `TorchLlmArgs` that says which decode steps run as CUDA graphs."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from tensorweave.cluster.strict_model import Field, StrictBaseModel


class CudaGraphConfig(StrictBaseModel):
    """Which decode steps run as CUDA graphs: for each batch size a graph is captured while the engine warms up."""

    batch_sizes: list[int] | None = Field(
        None,
        status="beta",
        min_length=1,
        description="Batch sizes that get a graph. Default, with padding: 1, 2, 4, then every eighth to 256, every "
        "sixteenth to 512, every 64th beyond, and the largest; without: 1 to 32, then powers of two, and the largest.",
    )
    max_batch_size: int = Field(
        0,
        status="beta",
        ge=0,
        description="Largest batch that runs as a graph; 0: as many requests as a step may have. Larger steps launch "
        "their kernels one by one.",
    )
    enable_padding: bool = Field(
        True,
        status="beta",
        description="Run a batch in the graph of the next larger size. False: a batch whose size has no graph launches "
        "its kernels one by one.",
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if min(self.batch_sizes or [1]) < 1:
            raise ValueError(f"batch_sizes has {min(self.batch_sizes or [])}, must be at least 1")
        largest = max(self.batch_sizes or [0])
        if largest and self.max_batch_size not in {0, largest}:
            raise ValueError(f"max_batch_size is {self.max_batch_size}, the largest of batch_sizes {largest}: give one")
        return self


def graph_sizes(config: CudaGraphConfig, max_batch_size: int) -> tuple[int, ...]:
    """The batch sizes to capture, ascending, where a step has at most `max_batch_size` requests."""
    if config.batch_sizes is not None:
        return tuple(size for size in sorted(set(config.batch_sizes)) if size <= max_batch_size)
    largest = min(config.max_batch_size or max_batch_size, max_batch_size)
    if config.enable_padding:
        candidates = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, largest, 64)]
    else:
        candidates = [*range(1, 33), *(1 << power for power in range(6, largest.bit_length()))]
    return (*(size for size in candidates if size < largest), largest)
