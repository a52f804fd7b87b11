"""Which products of a model adapters may update: noted while the model is built, read when an adapter is loaded.

`PlainLinears` is the Null object of models without adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tensorweave.kernels.linear.reference import Linear
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.models.layers import (
    AdaptedColumnLinear,
    AdaptedRowLinear,
    ColumnForm,
    ColumnLinear,
    RowForm,
    RowLinear,
)


@dataclass(frozen=True, slots=True)
class SitePart:
    """One linear layer of a checkpoint within a product: of its outputs this rank computes `rows`, which are those from
    `first` on of the product, from the inputs `columns`. `num_outputs` and `num_inputs` are over all ranks."""

    name: str
    num_outputs: int
    num_inputs: int
    rows: range
    columns: range
    first: int


Site = tuple[SitePart, ...]


class LinearForms(Protocol):
    """Chooses the form in which a model's linear layers are built."""

    def column(self, linear: Linear, site: Site) -> ColumnForm: ...

    def row(self, linear: Linear, site: Site, comm: Comm) -> RowForm: ...


class PlainLinears:
    def column(self, linear: Linear, site: Site) -> ColumnForm:
        return ColumnLinear(linear)

    def row(self, linear: Linear, site: Site, comm: Comm) -> RowForm:
        return RowLinear(linear, comm)


class AdaptedLinears:
    """`sites` grows while a model is built."""

    def __init__(self) -> None:
        self.sites: list[Site] = []

    def column(self, linear: Linear, site: Site) -> ColumnForm:
        return AdaptedColumnLinear(linear, self._note(site))

    def row(self, linear: Linear, site: Site, comm: Comm) -> RowForm:
        return AdaptedRowLinear(linear, comm, self._note(site))

    def _note(self, site: Site) -> int:
        self.sites.append(site)
        return len(self.sites) - 1


def column_site(parts: Sequence[tuple[str, int, range]], num_inputs: int) -> Site:
    """Of names, numbers of outputs over all ranks, and the rows that this rank keeps. Rows of one linear layer that
    follow each other are one part, whose A is multiplied once."""
    site, first = list[SitePart](), 0
    for name, num_outputs, rows in parts:
        last = site[-1] if site else None
        if last is not None and last.name == name and last.rows.stop == rows.start:
            site[-1] = replace(last, rows=range(last.rows.start, rows.stop))
        else:
            site.append(SitePart(name, num_outputs, num_inputs, rows, range(num_inputs), first))
        first += len(rows)
    return tuple(site)
