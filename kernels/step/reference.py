"""The start of a step whose state lives on a device, in torch: see `begin_step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

# R rows of a step, S sequence slots, W blocks per row of the block tables, E entries of an update

FROM_DEVICE: Final = -1
"""In place of a row's token: the newest token of the row's slot, which only the device has."""


@dataclass(frozen=True, slots=True)
class SequenceState:
    """What a device keeps of each sequence, by slot.

    Args:
        tables_SW: int32, the sequence's KV blocks in order.
        tokens_S: int32, its newest token, if a step on the device has sampled that.
    """

    tables_SW: Tensor
    tokens_S: Tensor


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """Entries of the block tables that have changed. All int32.

    Args:
        places_E: slot * W + index of each; a place that no sequence uses may come often.
        blocks_E: the blocks that go there.
    """

    places_E: Tensor
    blocks_E: Tensor


def begin_step(
    slots_R: Tensor, given_tokens_R: Tensor, state: SequenceState, update: TableUpdate, tokens_R: Tensor
) -> None:
    """Write the update into the block tables, and each row's token into `tokens_R`.

    Args:
        slots_R: int32, the slot of each row.
        given_tokens_R: int32, the row's token, or FROM_DEVICE.
        tokens_R: int32, written.
    """
    state.tables_SW.view(-1).index_copy_(0, update.places_E.long(), update.blocks_E)
    newest_R = state.tokens_S.index_select(0, slots_R.long())
    tokens_R.copy_(newest_R.where(given_tokens_R == FROM_DEVICE, given_tokens_R))
