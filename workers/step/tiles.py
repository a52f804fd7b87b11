"""Sizes of steps with decodes and prompt tokens that a GPU computes well: schedulers plan steps of these sizes, and the
engine captures them."""

from __future__ import annotations

import bisect
from typing import Final

TILE: Final = 128
"""Rows of a tile of a GPU's matrix products: a step of one token more computes a whole tile more."""
STEP_ROWS: Final = (128, 256, 384, 512, 1024, 2048, 4096, 8192)
"""Rows of whole steps. Between them products lose: of an 8B model on an H100, steps of 512, 640 and 1,024 rows take 12,
18 and 20 ms, and those of 2,048 and 2,304 rows 40 and 50."""
MOST_CAPTURED_ROWS: Final = 1024
"""Longer steps are launched kernel by kernel: a GPU computes an 8B model's for longer than that takes."""
DECODE_ROWS: Final = (0, 8, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Rows that decodes take in a captured step with prompt tokens."""
_LEAST_PROMPT_TOKENS: Final = 32


def rows_of_decodes(num_decodes: int) -> int:
    """Rows that so many decodes take in a captured step with prompt tokens."""
    at = bisect.bisect_left(DECODE_ROWS, num_decodes)
    return DECODE_ROWS[at] if at < len(DECODE_ROWS) else num_decodes


def prompt_tokens_beside(num_decodes: int) -> list[int]:
    """Ascending: numbers of prompt tokens that fill a whole step beside so many decodes."""
    numbers = [prompt_tokens_to_fill(rows, num_decodes) for rows in STEP_ROWS]
    return [number for number in numbers if number >= _LEAST_PROMPT_TOKENS]


def prompt_tokens_to_fill(num_rows: int, num_decodes: int) -> int:
    """Prompt tokens that fill a step of `num_rows` beside so many decodes; below 1 where there is no room for any."""
    return num_rows - (rows_of_decodes(num_decodes) if num_rows <= MOST_CAPTURED_ROWS else num_decodes)


def whole_tiles(num_tokens: int, num_decodes: int) -> int:
    """The most tokens up to this many, `num_decodes` of them decodes, that fill whole tiles of a product."""
    if num_tokens <= 2 * TILE:
        return num_tokens
    padding = rows_of_decodes(num_decodes) - num_decodes if num_tokens <= MOST_CAPTURED_ROWS else 0
    return (num_tokens + padding) // TILE * TILE - padding
