"""The structures of `kernels/c` that Python fills, field by field as in the C source.

`check_sizes` is called once, when the library is loaded.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Final

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class QueryTile(ctypes.Structure):
    """`query_tile` in attention_cells.h: queries [row, row + num_queries) of the batch, at positions `start` and on."""

    _fields_ = (
        ("row", _INT),
        ("num_queries", _INT),
        ("start", _INT),
        ("first_block", _INT),
        ("first_task", _INT),
    )


class WindowPlan(ctypes.Structure):
    """`window_plan` in attention_cells.h: a step's attention in layers of one window; 0 for no window."""

    _fields_ = (
        ("tiles", _POINTER),
        ("blocks", _POINTER),
        ("num_tiles", _INT),
        ("num_tasks", _INT),
        ("window", _INT),
    )
    num_tiles: int
    num_tasks: int


class MatrixForm(IntEnum):
    """What a `Matrix` points to: weights of the rows' type, bfloat16 for float32 rows, or integers in groups."""

    PACKED = 0
    NARROW = 1
    GROUPED = 2


class Matrix(ctypes.Structure):
    """`matrix` in grouped.h. The fields from `bits` on are those of `MatrixForm.GROUPED`."""

    _fields_ = (
        ("packed", _POINTER),
        ("bias", _POINTER),
        ("num_outputs", _INT),
        ("num_inputs", _INT),
        ("form", _INT),
        ("bits", _INT),
        ("zero", _INT),
        ("group", _INT),
        ("block", _INT),
        ("row_bytes", _INT),
        ("has_minimums", _INT),
        ("has_half_scales", _INT),
    )
    packed: int
    bias: int | None
    num_outputs: int
    num_inputs: int
    form: int
    block: int
    row_bytes: int


class DecoderLayer(ctypes.Structure):
    """`decoder_layer` in layers.h."""

    _fields_ = (
        ("attention_norm", _POINTER),
        ("query_norm", _POINTER),
        ("key_norm", _POINTER),
        ("mlp_norm", _POINTER),
        ("after_attention", _POINTER),
        ("after_mlp", _POINTER),
        ("sinks", _POINTER),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("window", _INT),
        ("rope", _INT),
        ("qkv_site", _INT),
        ("output_site", _INT),
        ("gate_up_site", _INT),
        ("down_site", _INT),
    )


class UpdatePart(ctypes.Structure):
    """`update_part` in lora.h."""

    _fields_ = (
        ("a", _POINTER),
        ("b", _POINTER),
        ("rank", _INT),
        ("first", _INT),
        ("num_outputs", _INT),
    )
    a: int
    b: int
    rank: int
    first: int
    num_outputs: int


class UpdateSite(ctypes.Structure):
    """`update_site` in lora.h."""

    _fields_ = (("parts", _POINTER), ("num_parts", _INT), ("rank", _INT))
    parts: int
    num_parts: int
    rank: int


class UpdateSegment(ctypes.Structure):
    """`update_segment` in lora.h."""

    _fields_ = (("sites", _POINTER), ("rows", _POINTER), ("num_rows", _INT), ("first", _INT))
    sites: int
    rows: int
    num_rows: int
    first: int


class UpdateBlock(ctypes.Structure):
    """`update_block` in lora.h."""

    _fields_ = (("segments", _POINTER), ("num_segments", _INT), ("most_rank", _INT), ("scratch", _POINTER))
    segments: int
    num_segments: int
    most_rank: int
    scratch: int


class StackStep(ctypes.Structure):
    """`stack_step` in layers.h: first what is the same in every step, then this step's batch."""

    _fields_ = (
        ("num_layers", _INT),
        ("query_heads", _INT),
        ("kv_heads", _INT),
        ("block_tokens", _INT),
        ("head_dim", _INT),
        ("num_read_heads", _INT),
        ("group", _INT),
        ("read_heads", _POINTER),
        ("epsilon", _FLOAT),
        ("norm_offset", _FLOAT),
        ("scale", _FLOAT),
        ("cap", _FLOAT),
        ("update_factor", _FLOAT),
        ("is_gelu", _INT),
        ("turned", _INT),
        ("has_neighbours", _INT),
        ("is_fp8", _INT),
        ("num_done", _POINTER),
        ("caches", _POINTER),
        ("windows", _POINTER),
        ("num_tokens", _INT),
        ("rope_tables", _POINTER),
        ("slots", _POINTER),
        ("x", _POINTER),
        ("scratch", _POINTER),
        ("partial", _POINTER),
        ("updates", _POINTER),
    )
    num_layers: int
    query_heads: int
    kv_heads: int
    block_tokens: int
    num_read_heads: int
    group: int
    read_heads: int
    turned: int
    is_fp8: bool
    caches: int
    windows: int
    num_tokens: int
    rope_tables: int
    slots: int
    x: int
    scratch: int
    partial: int
    updates: int | None


class Expert(ctypes.Structure):
    """`expert` in mixture.h."""

    _fields_ = (("gate_up", Matrix), ("down", Matrix))


class Mixture(ctypes.Structure):
    """`mixture` in mixture.h."""

    _fields_ = (
        ("experts", _POINTER),
        ("num_experts", _INT),
        ("first", _INT),
        ("num_here", _INT),
        ("num_chosen", _INT),
        ("hidden", _INT),
        ("width", _INT),
        ("is_renormalized", _INT),
        ("is_rounded", _INT),
        ("alpha", _FLOAT),
        ("limit", _FLOAT),
        ("shift", _FLOAT),
    )


_C_NAMES: Final[dict[str, type[ctypes.Structure]]] = {
    "query_tile": QueryTile,
    "window_plan": WindowPlan,
    "matrix": Matrix,
    "decoder_layer": DecoderLayer,
    "stack_step": StackStep,
    "expert": Expert,
    "mixture": Mixture,
    "update_part": UpdatePart,
    "update_site": UpdateSite,
    "update_segment": UpdateSegment,
    "update_block": UpdateBlock,
}


def check_sizes(library: ctypes.CDLL) -> None:
    """A size that differs is a mistake in this file or in the C source: the kernels would read the wrong memory."""
    for name, structure in _C_NAMES.items():
        size = ctypes.c_int64.in_dll(library, f"sizeof_{name}").value
        assert ctypes.sizeof(structure) == size, f"{name} has {size} bytes in C, {ctypes.sizeof(structure)} here"
