"""Low-rank updates of matrix products (LoRA), in torch on any device: `out[row] += B A x[row]`, each row by the adapter
of its own request.

A product that adapters may update is a *site*, numbered from 0 when the model is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

# T tokens, K inputs and N outputs of a product, R rank of a part of an update


@dataclass(frozen=True, slots=True)
class UpdatePart:
    """Outputs [first, first + N) of a product get x Aᵀ Bᵀ. The numbers of B have the adapter's scale."""

    a_RK: Tensor
    b_NR: Tensor
    first: int


class Updates(Protocol):
    """What the adapters of one step's rows add."""

    def add(self, site: int, x_TK: Tensor, out_TN: Tensor) -> Tensor:
        """Add to the product `out` of x, in place; return it. Both are contiguous."""


class PacksAdapters(Protocol):
    def pack(self, sites: Sequence[Sequence[UpdatePart]]) -> Any:
        """The parts of each site, none where the adapter leaves it as it is."""


class AdapterKernels(PacksAdapters, Protocol):
    """Packs an adapter once, and plans each step with packed ones."""

    def plan(self, rows: Sequence[tuple[Any, Sequence[int]]], num_tokens: int) -> Updates:
        """`rows` has each packed adapter of the step once, with its rows of the `num_tokens`."""


class NoUpdates:
    """No row has an adapter."""

    def add(self, site: int, x_TK: Tensor, out_TN: Tensor) -> Tensor:
        return out_TN


NO_UPDATES: Final = NoUpdates()


@dataclass(frozen=True, slots=True)
class ReferenceUpdates:
    segments: Sequence[tuple[Sequence[Sequence[UpdatePart]], Tensor]]

    def add(self, site: int, x_TK: Tensor, out_TN: Tensor) -> Tensor:
        for sites, rows in self.segments:
            for part in sites[site]:
                low = (x_TK[rows].float() @ part.a_RK.float().T).to(x_TK.dtype)
                update = low.float() @ part.b_NR.float().T
                columns = slice(part.first, part.first + len(part.b_NR))
                out_TN[rows, columns] = (out_TN[rows, columns].float() + update).to(out_TN.dtype)
        return out_TN


@dataclass(frozen=True, slots=True)
class ReferenceAdapters:
    device: torch.device

    def pack(self, sites: Sequence[Sequence[UpdatePart]]) -> Sequence[Sequence[UpdatePart]]:
        return tuple(tuple(parts) for parts in sites)

    def plan(self, rows: Sequence[tuple[Any, Sequence[int]]], num_tokens: int) -> Updates:
        if not rows:
            return NO_UPDATES
        return ReferenceUpdates([(sites, torch.tensor(list(of), device=self.device)) for sites, of in rows])
