"""The slow twin of the decoder's choice: one row of logits, a loop of plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tensorweave.cluster.protocol import SamplingSpec

Logits = npt.NDArray[np.floating[Any]]


def chosen(logits: Logits, spec: SamplingSpec, top_p: float, number: float) -> int:
    """Temperature, min-p, top-k, top-p, then the inverse of the cumulative distribution in vocabulary order."""
    if spec.is_greedy:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / spec.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    probs[probs < spec.min_p * probs.max()] = 0
    order = np.argsort(-probs, kind="stable")
    if spec.top_k:
        probs[order[spec.top_k :]] = 0
    if top_p < 1:
        share = probs[order] / probs.sum()
        reached = np.cumsum(share) - share
        probs[[token for rank, token in enumerate(order) if rank > 0 and reached[rank] >= top_p]] = 0
    cumulative = np.cumsum(probs)
    return int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
