"""The Triton kernels of the rule in `kernels.sample.rule`."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

# ruff: noqa: SIM102 (Triton decides an if on a constexpr when it compiles, so it stands alone)

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tensorweave.kernels.argmax.reference import NO_PLACE, NOTHING_LEFT
from tensorweave.kernels.sample.rule import KEYS_PER_UNIT, LARGEST_W, MASS_OF_LARGEST

# R rows of logits, V vocabulary, Y chunks of a row, each of one program

MASS_BITS: Final = 44  # and 19 for a count: vocabularies below 2¹⁹ tokens
BINS: Final = 2048

_KEYS_PER_UNIT = tl.constexpr(float(KEYS_PER_UNIT))
_MASS_OF_LARGEST = tl.constexpr(float(MASS_OF_LARGEST))
_MASS_BITS = tl.constexpr(MASS_BITS)
_MASS_MASK = tl.constexpr((1 << MASS_BITS) - 1)
_BINS = tl.constexpr(BINS)
_LARGEST_W = tl.constexpr(LARGEST_W)
_NO_PLACE = tl.constexpr(NO_PLACE)
_NOTHING_LEFT = tl.constexpr(NOTHING_LEFT)
_LAST_KEY = tl.constexpr(BINS * BINS - 1)


@triton.jit
def _mix64(z):
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _mix32(h, key):
    """The finaliser of MurmurHash3, with a key in its middle."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13) ^ key) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _gumbel(seed, position, token):
    row = _mix64(seed.to(tl.uint64) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03)
    row = _mix64(row + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    h = _mix32(token.to(tl.uint32) * 0x9E3779B1 + low, high)
    w = tl.minimum((h.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), _LARGEST_W)
    # -log(1 - w) without the loss of small w, where the largest Gumbel numbers come from: the series below 1/16.
    series = w * (1 + w * (1 / 2 + w * (1 / 3 + w * (1 / 4 + w * (1 / 5 + w * (1 / 6))))))
    return -tl.log(tl.where(w < 0.0625, series, -tl.log(1 - w)))


@triton.jit
def _key(x, largest, temperature):
    z = (largest - x) / temperature
    z = tl.where(z == z, z, 0.0)
    return z, tl.minimum(z * _KEYS_PER_UNIT, _LAST_KEY * 1.0).to(tl.int32)


@triton.jit
def _limit_of_min_p(min_p):
    return tl.where(min_p > 0, tl.minimum(-tl.log(min_p) * _KEYS_PER_UNIT, _LAST_KEY * 1.0), _LAST_KEY * 1.0).to(
        tl.int32
    )


@triton.jit
def _scan(bins_ptr, count_before, mass_before):
    """Scan a histogram: each bin's packed number, counts up to and with it, masses before it."""
    packed = tl.load(bins_ptr + tl.arange(0, _BINS), cache_modifier=".cg")
    sums = tl.cumsum(packed, 0)
    before = sums - packed
    return (sums >> _MASS_BITS) + count_before, (before & _MASS_MASK) + mass_before, packed


@triton.jit
def _bin_of_count(counts, k):
    """The first bin with which k tokens are reached; the last, if they never are."""
    return tl.minimum(tl.sum((counts < k).to(tl.int32), 0), _BINS - 1)


@triton.jit
def _bin_of_mass(masses_before, target):
    """The last bin before which the mass is less than the target."""
    return tl.maximum(tl.sum((masses_before.to(tl.float64) < target).to(tl.int32), 0) - 1, 0)


@triton.jit
def _pick(values, bin):
    return tl.sum(tl.where(tl.arange(0, _BINS) == bin, values, 0), 0)


@triton.jit
def _limits(bins_ptr, row, k, p, LEVEL: tl.constexpr):
    """(coarse bin to refine or -1, largest key kept so far) at each level of the search.

    Histograms of a row: coarse; fine ones of the bin of top-k; fine ones of the bin of top-p.
    """
    coarse_ptr = bins_ptr + row * 3 * _BINS
    counts, masses, packed = _scan(coarse_ptr, 0, 0)
    total = tl.sum(packed & _MASS_MASK, 0)
    has_k = k > 0
    refine = -1
    limit = _LAST_KEY + 0
    if has_k:
        bin_k = _bin_of_count(counts, k)
        if LEVEL == 1:
            refine = bin_k
        else:
            count_before = _pick(counts - (packed >> _MASS_BITS), bin_k)
            mass_before = _pick(masses, bin_k)
            fine_counts, fine_masses, fine_packed = _scan(coarse_ptr + _BINS, count_before, mass_before)
            fine_k = _bin_of_count(fine_counts, k)
            limit = bin_k * _BINS + fine_k
            total = _pick(fine_masses + (fine_packed & _MASS_MASK), fine_k)
    if (p < 1) & ((LEVEL > 1) | (has_k == 0)):
        target = p.to(tl.float64) * total.to(tl.float64)
        bin_p = _bin_of_mass(masses, target)
        if LEVEL == 3:
            fine_counts, fine_masses, fine_packed = _scan(coarse_ptr + 2 * _BINS, 0, _pick(masses, bin_p))
            limit = tl.minimum(limit, bin_p * _BINS + _bin_of_mass(fine_masses, target))
        else:
            refine = bin_p
    return refine, limit


@triton.jit(do_not_specialize=["V", "row_stride", "chunk"])
def maxima(logits_ptr, maxima_ptr, V, row_stride, chunk, Y: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, V), BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = token < V
        x = tl.load(logits_ptr + row.to(tl.int64) * row_stride + token, mask=mask, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, x)
    tl.store(maxima_ptr + row * Y + part, tl.max(best, 0))


@triton.jit(do_not_specialize=["V", "row_stride", "chunk"])
def histogram(
    logits_ptr, maxima_ptr, bins_ptr, found_ptr, arrived_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    V, row_stride, chunk, Y: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Level 0: the coarse bins; level 1: the fine ones of top-k, or of top-p alone; level 2: those of top-p after k.

    The last program of a row searches what was counted, for the programs of the next pass.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    temperature = tl.load(temperature_ptr + row)
    k, p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    refine = -1
    target_ptr = bins_ptr + row * 3 * _BINS
    is_needed = (temperature > 0) & ((k > 0) | (p < 1))
    if LEVEL == 2:
        is_needed = is_needed & (k > 0) & (p < 1)
    if is_needed:
        if LEVEL > 0:
            refine = tl.load(found_ptr + row * 2)
            target_ptr += tl.where((LEVEL == 1) & (k > 0), _BINS, 2 * _BINS)
        largest = tl.max(tl.load(maxima_ptr + row * Y + tl.arange(0, Y)), 0)
        min_limit = _limit_of_min_p(tl.load(min_p_ptr + row))
        for start in range(part * chunk, tl.minimum(part * chunk + chunk, V), BLOCK):
            token = start + tl.arange(0, BLOCK)
            mask = token < V
            x = tl.load(logits_ptr + row.to(tl.int64) * row_stride + token, mask=mask, other=0.0).to(tl.float32)
            z, key = _key(x, largest, temperature)
            mass = (tl.exp(-z) * _MASS_OF_LARGEST + 0.5).to(tl.int64)
            kept = mask & (key <= min_limit)
            place = key // _BINS
            if LEVEL > 0:
                kept = kept & (place == refine)
                place = key % _BINS
            one = tl.full((BLOCK,), 1, tl.int64) << _MASS_BITS
            tl.atomic_add(target_ptr + place, one + mass, mask=kept, sem="relaxed")
        tl.debug_barrier()  # all threads' additions are made before this program is counted
        if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == Y - 1:
            tl.store(arrived_ptr + row, 0)
            if LEVEL < 2:
                refine, _ = _limits(bins_ptr, row, k, p, LEVEL + 1)
                tl.store(found_ptr + row * 2, refine)
            if LEVEL > 0:
                _, limit = _limits(bins_ptr, row, k, p, 3)
                tl.store(found_ptr + row * 2 + 1, limit)


@triton.jit(do_not_specialize=["V", "row_stride", "chunk", "first"])
def draw(
    logits_ptr, maxima_ptr, found_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    scores_ptr, places_ptr, V, row_stride, chunk, first, Y: tl.constexpr, SAMPLED: tl.constexpr, LIMITED: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best score of each chunk, and its place in the row. `first` is the id of the row's first token."""
    row, part = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    temperature = 0.0
    if SAMPLED:
        temperature = tl.load(temperature_ptr + row)
        seed, position = tl.load(seed_ptr + row).to(tl.int64), tl.load(position_ptr + row).to(tl.int64)
    limit = _LAST_KEY + 0
    largest = 0.0
    is_limited = False
    if LIMITED:
        k, p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        is_limited = (temperature > 0) & ((k > 0) | (p < 1) | (min_p > 0))
        if is_limited:
            limit = _limit_of_min_p(min_p)
            if (k > 0) | (p < 1):
                limit = tl.minimum(limit, tl.load(found_ptr + row * 2 + 1))
            largest = tl.max(tl.load(maxima_ptr + row * Y + tl.arange(0, Y)), 0)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, V), BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row.to(tl.int64) * row_stride + token, mask=token < V, other=float("-inf")).to(
            tl.float32
        )
        score = x
        if SAMPLED:
            if temperature > 0:
                score = x + temperature * _gumbel(seed, position, first + token)
        if LIMITED:
            if is_limited:
                _, key = _key(x, largest, temperature)
                score = tl.where(key <= limit, score, float("-inf"))
        score = tl.where(
            (x != x) | (x == float("inf")), float("inf"), score
        )  # shows at the end as a row without a place
        place = tl.where(score > best, token, place)
        best = tl.maximum(best, score)
    top = tl.max(best, 0)
    tl.store(scores_ptr + row * Y + part, top)
    tl.store(places_ptr + row * Y + part, tl.min(tl.where(best == top, place, 2147483647), 0))


@triton.jit
def finish(
    scores_ptr, places_ptr, bins_ptr, out_ptr, slots_ptr, newest_ptr, Y: tl.constexpr, LIMITED: tl.constexpr,
    HAS_SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    y = tl.arange(0, Y)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    score = tl.load(scores_ptr + row * Y + y)
    place = tl.load(places_ptr + row * Y + y)
    top = tl.max(score, 0)
    first = tl.min(tl.where(score == top, place, 2147483647), 0)
    first = tl.where(top == float("inf"), _NO_PLACE, tl.where(top == float("-inf"), _NOTHING_LEFT, first))
    tl.store(out_ptr + row, first.to(out_ptr.dtype.element_ty))
    if HAS_SLOTS:
        tl.store(newest_ptr + tl.load(slots_ptr + row), tl.maximum(first, 0).to(newest_ptr.dtype.element_ty))
    if LIMITED:
        for part in tl.static_range(3):
            tl.store(bins_ptr + (row * 3 + part) * _BINS + tl.arange(0, _BINS), tl.zeros((_BINS,), tl.int64))
