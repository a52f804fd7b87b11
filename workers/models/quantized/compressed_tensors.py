"""`quant_method` compressed-tensors of a `quantization_config`: one format for each of its `config_groups`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.workers.models.quantized.checkpoint_quantization import CheckpointQuantization
from tensorweave.workers.models.quantized.fields import QuantFields
from tensorweave.workers.models.quantized.fp8_matrices import Fp8Matrices
from tensorweave.workers.models.quantized.integer_matrices import IntMatrices, PackedMatrices
from tensorweave.workers.models.quantized.matrix_format import MatrixFormat
from tensorweave.workers.models.quantized.mxfp4_matrices import MXFP4_GROUP, Mxfp4Matrices

_KEYS: Final = frozenset(
    {
        "config_groups",
        "format",
        "global_compression_ratio",
        "ignore",
        "kv_cache_scheme",
        "quant_method",
        "quantization_status",
        "run_compressed",
        "use_optimized_inference",
        "version",
    }
)
_GROUP_KEYS: Final = frozenset({"format", "input_activations", "targets", "weights"})
_WEIGHT_KEYS: Final = frozenset(
    {
        "actorder",
        "block_structure",
        "group_size",
        "num_bits",
        "observer",
        "observer_kwargs",
        "scale_dtype",
        "strategy",
        "symmetric",
        "type",
        "zp_dtype",
    }
)
_FORMATS: Final = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mxfp4-pack-quantized")
_MIXED: Final = "mixed-precision"
_PACKED_BITS: Final = (2, 4, 8)
_LINEAR: Final = "Linear"
_PATTERN: Final = "re:"


@dataclass(frozen=True, slots=True)
class Targets:
    """Names of modules, patterns behind 're:', and 'Linear' for all linear layers."""

    names: tuple[str, ...]

    def __contains__(self, module: object) -> bool:
        return any(_matches(name, str(module)) for name in self.names)


def read_compressed_tensors(fields: QuantFields) -> CheckpointQuantization:
    fields.refuse_unknown(_KEYS | {"sparsity_config", "transform_config"})
    for key in ("sparsity_config", "transform_config"):
        if _has_content(fields.raw.get(key)):
            raise fields.wrong(key, "empty: weights that are neither sparse nor transformed")
    whole = fields.choice("format", (*_FORMATS, _MIXED))
    groups = fields.inner("config_groups")
    if groups is None or not groups.raw:
        raise fields.wrong("config_groups", "at least one group")
    formats = []
    for name in groups.raw:
        group = groups.inner(name)
        assert group is not None
        formats.append((Targets(group.names("targets")), _read_group(group, whole)))
    return CheckpointQuantization.of_formats("compressed-tensors", tuple(formats), Targets(fields.names("ignore")))


def _read_group(group: QuantFields, whole: str) -> MatrixFormat:
    group.refuse_unknown(_GROUP_KEYS)
    weights = group.inner("weights")
    if weights is None:
        raise group.wrong("weights", "an object that says how they are quantized")
    weights.refuse_unknown(_WEIGHT_KEYS)
    kind = whole if group.raw.get("format") is None else group.choice("format", _FORMATS)
    if kind == _MIXED:
        raise group.wrong("format", f"one of {', '.join(_FORMATS)} in each group of a {_MIXED} checkpoint")
    if kind == "mxfp4-pack-quantized":
        weights.require("num_bits", 4)
        weights.require("group_size", MXFP4_GROUP)
        return Mxfp4Matrices()
    if weights.choice("type", ("int", "float")) == "float":
        return _read_floats(weights)
    return _read_integers(weights, is_packed=kind == "pack-quantized")


def _read_floats(weights: QuantFields) -> Fp8Matrices:
    weights.require("num_bits", 8)
    weights.require("symmetric", True)
    if weights.choice("strategy", ("tensor", "channel", "block")) != "block":
        return Fp8Matrices(None)
    block = weights.raw.get("block_structure")
    if isinstance(block, str):
        block = [int(size) for size in block.split("x") if size.isdecimal()]
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise weights.wrong("block_structure", "two whole numbers above 0")
    return Fp8Matrices((block[0], block[1]))


def _read_integers(weights: QuantFields, *, is_packed: bool) -> MatrixFormat:
    bits, is_symmetric = weights.count("num_bits"), weights.flag("symmetric", True)
    group_size = None
    if weights.choice("strategy", ("tensor", "channel", "group"), _implied_strategy(weights)) == "group":
        group_size = weights.count("group_size")
        if group_size < 1:
            raise weights.wrong("group_size", "a whole number above 0 with strategy 'group'")
    if is_packed:
        if bits not in _PACKED_BITS:
            raise weights.wrong("num_bits", ", ".join(map(str, _PACKED_BITS)))
        return PackedMatrices(bits, group_size, is_symmetric)
    weights.require("num_bits", 8)
    return IntMatrices(group_size, is_symmetric)


def _implied_strategy(weights: QuantFields) -> str:
    size = weights.raw.get("group_size")
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


def _matches(name: str, module: str) -> bool:
    if name.startswith(_PATTERN):
        return re.match(name.removeprefix(_PATTERN), module) is not None
    return name in (module, _LINEAR)


def _has_content(value: Any) -> bool:
    """Sparsity of the format 'dense' is none."""
    return bool(value) and not (isinstance(value, dict) and value.get("format") == "dense")
