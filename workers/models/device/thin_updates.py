"""What adapters add to the products of `ThinLayers`: `AdapterUpdates`, and `NO_THIN_UPDATES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from tensorweave.kernels.lora.cuda_shrink import ShrinkWorkspace, shrink
from tensorweave.kernels.lora.stack import SiteStack
from tensorweave.kernels.lora.update import LowRankUpdate
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.model import LayerSites

# R rows, K inputs of a product

_READS_EARLY: Final = True
"""Whether products begin while the first matrices of adapters are still applied, or wait for that."""
NO_SITES: Final = LayerSites(-1, -1, -1, -1)


class ThinUpdates(Protocol):
    @property
    def are_some(self) -> bool: ...

    def start(self, site: int, x_RK: Tensor) -> LowRankUpdate | None:
        """Launch the kernel that applies the adapters' first matrices to x, if there are any. The product of x must be
        the next kernel."""
        ...


class NoThinUpdates:
    are_some = False

    def start(self, site: int, x_RK: Tensor) -> LowRankUpdate | None:
        return None


NO_THIN_UPDATES: Final = NoThinUpdates()


@dataclass(frozen=True, slots=True)
class AdapterUpdates:
    """`stacks` by the number of a site; `places_R` of the rows' adapters, written before the step's embedding."""

    stacks: Sequence[SiteStack]
    places_R: Tensor
    workspace: ShrinkWorkspace

    @property
    def are_some(self) -> bool:
        return True

    def start(self, site: int, x_RK: Tensor) -> LowRankUpdate | None:
        stack = self.stacks[site]
        low_RPR = shrink(x_RK, self.places_R, stack, self.workspace, pdl=True)
        return LowRankUpdate(low_RPR, self.places_R, stack, reads_early=_READS_EARLY)


def thin_updates_maker(
    stacks: Sequence[SiteStack], buffers: StepBuffers, max_rows: int
) -> Callable[[int], ThinUpdates]:
    """Makes the updates of steps of some number of rows. No stacks: rows have no adapters."""
    if not stacks:
        return lambda num_rows: NO_THIN_UPDATES
    workspace = ShrinkWorkspace.create(stacks, max_rows)
    return lambda num_rows: AdapterUpdates(stacks, buffers.all.places_T[:num_rows], workspace)
