"""`quant_method` fp8, awq, gptq, modelopt and mxfp4 of a `quantization_config`, each with one format for matrices."""

from __future__ import annotations

import re
from typing import Final

from tensorweave.workers.models.quantized.awq_matrices import AwqMatrices
from tensorweave.workers.models.quantized.checkpoint_quantization import (
    CheckpointQuantization,
    Components,
    Patterns,
)
from tensorweave.workers.models.quantized.fields import QuantFields
from tensorweave.workers.models.quantized.fp8_matrices import Fp8Matrices
from tensorweave.workers.models.quantized.gptq_matrices import GptqMatrices
from tensorweave.workers.models.quantized.stacked_mxfp4 import StackedMxfp4Matrices

_IGNORED: Final = ("modules_to_not_convert", "ignored_layers", "ignore")
_OF_GPTQ: Final = frozenset(
    {
        "act_group_aware",
        "backend",
        "batch_size",
        "block_name_to_quantize",
        "cache_block_outputs",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "disable_exllama",
        "exllama_config",
        "max_input_length",
        "meta",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "mse",
        "pad_token_id",
        "quant_method",
        "static_groups",
        "tokenizer",
        "true_sequential",
        "use_cuda_fp16",
        "use_exllama",
    }
)
"""Keys of how a checkpoint was made, or of other implementations' kernels."""
_GPTQ_BITS: Final = (2, 4, 8)


def read_fp8(fields: QuantFields) -> CheckpointQuantization:
    """DeepSeek's and Qwen's checkpoints with blocks, transformers' and AutoFP8's per tensor."""
    known = {"fmt", "activation_scheme", "weight_block_size", "scale_fmt", "expert_dtype", "dequantize", "quant_method"}
    fields.refuse_unknown({*known, *_IGNORED, "kv_cache_scheme"})
    fields.require("fmt", "e4m3", "float8_e4m3fn")
    fields.require("activation_scheme", "dynamic", "static")
    fields.require("scale_fmt", "float", "ue8m0")
    fields.require("expert_dtype", "fp8")
    block = fields.raw.get("weight_block_size")
    if block is not None and not _is_block(block):
        raise fields.wrong("weight_block_size", "two whole numbers above 0, or null")
    matrices = Fp8Matrices(None if block is None else (block[0], block[1]))
    return CheckpointQuantization.of_formats("fp8", ((None, matrices),), Components(fields.names(*_IGNORED)))


def read_awq(fields: QuantFields) -> CheckpointQuantization:
    fields.refuse_unknown(
        {*_OF_GPTQ, *_IGNORED, "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format"}
    )
    fields.require("bits", 4)
    fields.require("w_bit", 4)
    fields.require("zero_point", True)
    key = "version" if fields.raw.get("version") is not None else "format"
    fields.choice(key, ("gemm",), "gemm")
    group_size = fields.count("group_size", fields.count("q_group_size", 128))
    ignored = Components(fields.names(*_IGNORED))
    return CheckpointQuantization.of_formats("awq", ((None, AwqMatrices(_group(fields, group_size))),), ignored)


def read_gptq(fields: QuantFields) -> CheckpointQuantization:
    fields.refuse_unknown(
        {*_OF_GPTQ, "bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "pack_dtype", "dynamic"}
    )
    bits = fields.count("bits")
    if bits not in _GPTQ_BITS:
        raise fields.wrong("bits", ", ".join(map(str, _GPTQ_BITS)))
    fields.require("pack_dtype", "int32")
    key = "checkpoint_format" if fields.raw.get("checkpoint_format") is not None else "format"
    layout = fields.choice(key, ("gptq", "gptq_v2"), "gptq")
    matrices = GptqMatrices(bits, _group(fields, fields.count("group_size", 128)), int(layout == "gptq"))
    return CheckpointQuantization.of_formats("gptq", ((None, matrices),), Patterns(_left_out(fields)))


def read_modelopt(fields: QuantFields) -> CheckpointQuantization:
    """NVIDIA's, in config.json or, under `quantization`, in hf_quant_config.json."""
    inner = fields.inner("quantization") or fields
    inner.refuse_unknown(
        {
            "config_groups",
            "exclude_modules",
            "ignore",
            "kv_cache_quant_algo",
            "kv_cache_scheme",
            "producer",
            "quant_algo",
            "quant_method",
        }
    )
    algorithm = inner.choice("quant_algo", ("fp8", "fp8_per_channel_per_token", "fp8_pb_wo"))
    matrices = Fp8Matrices((128, 128) if algorithm == "fp8_pb_wo" else None)
    globs = inner.names("exclude_modules", "ignore")
    return CheckpointQuantization.of_formats("modelopt", ((None, matrices),), Patterns(tuple(map(_of_glob, globs))))


def read_mxfp4(fields: QuantFields) -> CheckpointQuantization:
    """OpenAI's gpt-oss, of which the experts alone are quantized."""
    fields.refuse_unknown({"quant_method", "modules_to_not_convert", "dequantize"})
    ignored = Patterns(tuple(map(_of_glob, fields.names("modules_to_not_convert"))))
    return CheckpointQuantization.of_formats("mxfp4", ((None, StackedMxfp4Matrices()),), ignored)


def _left_out(fields: QuantFields) -> tuple[str, ...]:
    """`dynamic` of GPTQModel: patterns with what is particular to some modules; '-:' means not quantized."""
    found = []
    for pattern, changes in (fields.raw.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and changes:
            raise fields.wrong("dynamic", "patterns that begin with '-:', which leave modules unquantized")
        if pattern.startswith("-:"):
            found.append(pattern.removeprefix("-:"))
    return tuple(found)


def _group(fields: QuantFields, size: int) -> int:
    if size != -1 and (size < 1 or size % 8):
        raise fields.wrong("group_size", "-1, or a multiple of 8")
    return size


def _is_block(block: object) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)


def _of_glob(glob: str) -> str:
    """A pattern for a name in which '*' stands for anything, and for all below it."""
    return rf"{'.*'.join(map(re.escape, glob.split('*')))}(\.|$)"
