"""How many KV blocks the requests that decode will hold at most, as they grow and end. Used by the capacity scheduler.

Each request that decodes gets one token in every step until its last one at the latest, so what it holds in each future
step is known, and when its blocks come back. The peak of their sum is less than the sum of their peaks (the past-future
scheduler of LightLLM, arXiv 2507.10150, estimates it from the distribution of lengths; here it is a bound).

    blocks of A  ▁▂▃▄▅▆▇█         free again
    blocks of B      ▁▂▃▄▅▆▇█     free again         time: steps
    together     ▁▂▃▄▆███████▄▅▆▇█
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from tensorweave.workers.step.request import LlmRequest

# D requests that decode, P tokens per block

STEPS_TO_RELEASE: Final = 2
"""Steps that are prepared after a request's last one and before its blocks are free: one is launched while that one is
computed, and a block that was exchanged for an equal one at its end is free one step later."""


def future_peak(decoding: Sequence[LlmRequest], num_freed: Sequence[int], tokens_per_block: int) -> tuple[int, int]:
    """Blocks that requests need beyond those that they hold: in the worst step, and to the ends of all of them.

    Args:
        decoding: Requests with state GENERATION; each is in every step until its end.
        num_freed: For each, the blocks among those that it holds now that come back when it ends.
        tokens_per_block: P.

    Returns:
        The peak over all steps of what has been taken less what has come back, at least 0, and the sum that is taken.
    """
    if not decoding:
        return 0, 0
    launched_D = np.array([request.num_launched for request in decoding])
    ends_D = np.array([request.closes_at for request in decoding])
    steps_D = ends_D - launched_D
    order = steps_D.argsort(kind="stable")
    steps_D, launched_D = steps_D[order], launched_D[order]
    grown_D = -(-ends_D[order] // tokens_per_block) + -launched_D // tokens_per_block
    freed_D = np.array(num_freed)[order] + grown_D
    # U at the last step before each end's blocks come back: those before `first` have come back, those from `alive` on
    # still grow, and those between have ended.
    times_D = steps_D + STEPS_TO_RELEASE
    first_D = steps_D.searchsorted(steps_D)
    alive_D = steps_D.searchsorted(times_D)
    grown_before = np.concatenate(([0], grown_D.cumsum()))
    freed_before = np.concatenate(([0], freed_D.cumsum()))
    peak_D = grown_before[alive_D] - freed_before[first_D]
    peak_D += _growth(launched_D, alive_D, times_D, tokens_per_block)
    return max(0, int(peak_D.max())), int(grown_before[-1])


def _growth(launched_D: np.ndarray, alive_D: np.ndarray, times_D: np.ndarray, tokens_per_block: int) -> np.ndarray:
    """For each entry, the blocks that requests from `alive` on take within `times` steps.

    A request that has launched n tokens takes one every P steps, the first when n + t passes a multiple of P: within
    aP + b steps it is a, and one more if (n - 1) mod P + b >= P.
    """
    num_requests = len(launched_D)
    whole_D, rest_D = np.divmod(times_D, tokens_per_block)
    # [i, b]: of the last i requests those with (n - 1) mod P + b >= P.
    counts = np.zeros((num_requests + 1, tokens_per_block + 1), dtype=np.int32)
    counts[np.arange(num_requests, 0, -1), tokens_per_block - (launched_D - 1) % tokens_per_block] = 1
    np.add.accumulate(counts, axis=0, out=counts)
    np.add.accumulate(counts, axis=1, out=counts)
    num_alive_D = num_requests - alive_D
    growth_D: np.ndarray = num_alive_D * whole_D + counts[num_alive_D, rest_D]
    return growth_D
