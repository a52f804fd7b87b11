"""The start of a step whose state lives on a device, in one kernel: see `kernels.step.reference.begin_step`."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from tensorweave.kernels.step.reference import SequenceState, TableUpdate

# R rows of a step, E entries of an update

_BLOCK: Final = 256


@triton.jit(
    do_not_specialize=["R"],
    do_not_specialize_on_alignment=["slots_ptr", "given_ptr", "tokens_ptr"],  # they may begin anywhere in a buffer
)
def _begin_step(
    slots_ptr, given_ptr, state_tokens_ptr, tokens_ptr, tables_ptr, places_ptr, blocks_ptr, R,
    E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_entry = at < E
    place = tl.load(places_ptr + at, mask=is_entry, other=0)
    tl.store(tables_ptr + place, tl.load(blocks_ptr + at, mask=is_entry, other=0), mask=is_entry)
    is_row = at < R
    given = tl.load(given_ptr + at, mask=is_row, other=0)
    slot = tl.load(slots_ptr + at, mask=is_row, other=0)
    newest = tl.load(state_tokens_ptr + slot, mask=is_row & (given < 0), other=0)
    tl.store(tokens_ptr + at, tl.where(given < 0, newest, given), mask=is_row)


def begin_step(
    slots_R: Tensor, given_tokens_R: Tensor, state: SequenceState, update: TableUpdate, tokens_R: Tensor
) -> None:
    R, E = len(slots_R), len(update.places_E)
    _begin_step[(triton.cdiv(max(R, E), _BLOCK),)](
        slots_R, given_tokens_R, state.tokens_S, tokens_R, state.tables_SW, update.places_E, update.blocks_E, R,
        E=E, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
