"""What stands around attention and MLP of a layer, beside `RmsNorm`: nothing at all, or a factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

# T tokens, D hidden size


class InputNorm(Protocol):
    """What makes the input of attention or of an MLP from the residual stream: `RmsNorm`, or `ResidualSum`."""

    def __call__(self, x_TD: Tensor, update_TD: Tensor | None = None) -> Tensor:
        """Add the update to x in place; return the input. Nobody changes what is returned: it may be x itself."""
        ...


class OutputChange(Protocol):
    """What becomes of an output, summed over ranks, before it is added to the stream: `Unchanged`, `Scaled`, or
    `RmsNorm`."""

    def __call__(self, update_TD: Tensor, /) -> Tensor:
        """May change the update in place."""
        ...


@dataclass(frozen=True, slots=True)
class ResidualSum:
    """Attention or MLP reads the stream as it is (OLMo 2)."""

    def __call__(self, x_TD: Tensor, update_TD: Tensor | None = None) -> Tensor:
        if update_TD is not None:
            x_TD += update_TD
        return x_TD


@dataclass(frozen=True, slots=True)
class Unchanged:
    def __call__(self, update_TD: Tensor) -> Tensor:
        return update_TD


UNCHANGED: Final = Unchanged()


@dataclass(frozen=True, slots=True)
class Scaled:
    """Times a factor (Granite)."""

    factor: float

    def __call__(self, update_TD: Tensor) -> Tensor:
        return update_TD.mul_(self.factor)
