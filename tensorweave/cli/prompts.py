"""Random prompts of exact lengths for benchmarks: token ids, which every engine and completions endpoint takes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Final

# Special tokens stand at the ends of a vocabulary; the middle is ordinary text in every family that we run.
_MARGIN: Final = 0.1


def random_prompts(num_prompts: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`num_prompts` lists of `length` ids, the same for the same seed and different otherwise: no prefix is shared."""
    random_ids = random.Random(seed)
    low, high = int(vocab_size * _MARGIN), int(vocab_size * (1 - _MARGIN))
    return [[random_ids.randrange(low, high) for _ in range(length)] for _ in range(num_prompts)]


def vocab_size_of(model_dir: Path) -> int:
    """The `vocab_size` of a model directory's config.json. Raises ValueError where there is none."""
    try:
        return int(json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{model_dir}/config.json gives no vocab_size: {error!r}") from None
