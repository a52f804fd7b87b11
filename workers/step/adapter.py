"""What a step knows of a loaded adapter. `workers.lora` has the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class RankAdapter:
    """One rank's share: `packed` is what the kernels multiply by. Requests hold it while they run."""

    digest: bytes
    packed: Any
