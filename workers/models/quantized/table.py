"""The one place where a `quantization_config` becomes a `CheckpointQuantization`; other methods are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tensorweave.workers.models.quantized.checkpoint_quantization import CheckpointQuantization
from tensorweave.workers.models.quantized.compressed_tensors import read_compressed_tensors
from tensorweave.workers.models.quantized.fields import QuantFields
from tensorweave.workers.models.quantized.simple_methods import read_awq, read_fp8, read_gptq, read_modelopt, read_mxfp4


def _read_gguf(fields: QuantFields) -> CheckpointQuantization:
    """Read it as `store.gguf_directory` writes it: what is quantized, and how, is in the file itself."""
    fields.refuse_unknown({"quant_method", "bits"})
    return CheckpointQuantization("gguf", fields.count("bits"))


METHODS: Final[Mapping[str, Callable[[QuantFields], CheckpointQuantization]]] = {
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "gguf": _read_gguf,
    "gptq": read_gptq,
    "modelopt": read_modelopt,
    "mxfp4": read_mxfp4,
}
_KEYS: Final = ("quantization_config", "compression_config")
_OWN_FILE: Final = "hf_quant_config.json"


def read_quantization(raw: Mapping[str, Any], source: str) -> CheckpointQuantization | None:
    """From a parsed config.json, which `source` names in errors; None: the checkpoint is not quantized.

    Raises:
        ValueError: names the key, its value and what is supported.
    """
    for key in _KEYS:
        value = raw.get(key)
        if value and not isinstance(value, Mapping):
            raise ValueError(f"{source}: {key} is {value!r}, must be an object")
        if value:
            return _read_object(QuantFields(value, f"{source}: {key}"))
    return None


def with_own_file(raw: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    """A config.json with what modelopt writes beside it, where it says nothing itself."""
    file = directory / _OWN_FILE
    if not file.is_file() or any(raw.get(key) for key in _KEYS):
        return raw
    own = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(own, dict):
        raise ValueError(f"{file} holds a {type(own).__name__}, must be an object")
    return {**raw, "quantization_config": {"quant_method": "modelopt", **own}}


def _read_object(fields: QuantFields) -> CheckpointQuantization:
    method = str(fields.raw.get("quant_method"))
    if "quant_method" not in fields.raw and "config_groups" in fields.raw:
        method = "compressed-tensors"
    if method not in METHODS:
        raise fields.wrong("quant_method", ", ".join(METHODS))
    return METHODS[method](fields)
