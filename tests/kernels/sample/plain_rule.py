"""The rule of `kernels.sample.rule` in numpy, one row at a time."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorweave.kernels.sample.rule import KEYS_PER_UNIT, LAST_KEY, MASS_OF_LARGEST

Logits = npt.NDArray[np.floating[Any]]

_MASK: Final = (1 << 64) - 1
_LOW_32: Final = np.uint64(0xFFFFFFFF)


def mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def mix32(h: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    h = ((h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & _LOW_32
    h = ((h ^ (h >> np.uint64(13)) ^ np.uint64(key)) * np.uint64(0xC2B2AE35)) & _LOW_32
    return h ^ (h >> np.uint64(16))


def uniform(seed: int, position: int, vocab_size: int) -> npt.NDArray[np.float64]:
    """A number above 0 and below 1 for each token."""
    row = mix64((seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & _MASK)
    row = mix64((row + (position + 1) * 0x9E3779B97F4A7C15) & _MASK)
    token = np.arange(vocab_size, dtype=np.uint64)
    mixed = (token * np.uint64(0x9E3779B1) + np.uint64(row & 0xFFFFFFFF)) & _LOW_32
    h = mix32(mixed, row >> 32)
    return np.minimum((h.astype(np.float32) + np.float32(0.5)).astype(np.float64) * 2.0**-32, 1 - 2.0**-24)


def gumbel(seed: int, position: int, vocab_size: int) -> npt.NDArray[np.float64]:
    return -np.log(-np.log1p(-uniform(seed, position, vocab_size)))


def scores_of(logits: Logits, temperature: float, seed: int, position: int) -> npt.NDArray[np.float64]:
    return logits.astype(np.float64) + temperature * gumbel(seed, position, len(logits))


def keys_of(logits: Logits, temperature: float) -> npt.NDArray[np.int64]:
    z = (logits.max() - logits).astype(np.float32) / np.float32(temperature)
    return np.minimum(z * np.float32(KEYS_PER_UNIT), np.float32(LAST_KEY)).astype(np.int64)


def limit_of(logits: Logits, temperature: float, top_k: int, top_p: float, min_p: float) -> int:
    """The largest key that stays."""
    keys = keys_of(logits, temperature)
    z = (logits.max() - logits).astype(np.float32) / np.float32(temperature)
    mass = np.floor(np.exp(-z.astype(np.float64)) * MASS_OF_LARGEST + 0.5).astype(np.int64)
    limit = min(int(-math.log(min_p) * KEYS_PER_UNIT), LAST_KEY) if min_p > 0 else LAST_KEY
    order = np.argsort(keys, kind="stable")
    order = order[keys[order] <= limit]
    if 0 < top_k <= len(order):
        limit = int(keys[order[top_k - 1]])
        order = order[keys[order] <= limit]
    if top_p < 1:
        ordered, first = np.unique(keys[order], return_index=True)
        before = np.concatenate([[0], np.cumsum(mass[order])])[first]
        target = float(np.float32(top_p)) * float(mass[order].sum())
        limit = min(limit, int(ordered[np.flatnonzero(before < target)[-1]])) if target else 0
    return limit
