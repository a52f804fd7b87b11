"""`QuantConfig`: the part of `TorchLlmArgs` that says which weights are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final, Literal, Self

from pydantic import model_validator

from tensorweave.cluster.llm_args_refused import QUANT, Refusal
from tensorweave.cluster.strict_model import Field, StrictBaseModel


class QuantAlgo(StrEnum):
    """The names that `QuantConfig` takes."""

    FP8 = "FP8"
    FP8_PER_CHANNEL_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"
    W8A16 = "W8A16"
    W4A16 = "W4A16"
    INT8 = "INT8"
    W4A8_QSERVE_PER_GROUP = "W4A8_QSERVE_PER_GROUP"


@dataclass(frozen=True, slots=True)
class IntegerWeights:
    """Weights in integers of `bits` with a scale for each `group_size` inputs of an output (None: for each output) and,
    if `has_minimums`, a minimum; and rows that are rounded to `row_bits` while they are multiplied.

    The output head has 8 bits and a scale for each output.
    """

    bits: Literal[4, 8]
    row_bits: Literal[8, 16]
    group_size: int | None = None
    has_minimums: bool = False

    @property
    def name(self) -> str:
        """The name by which engine directories and gangs that exchange KV know it."""
        group = "" if self.group_size is None else f"_g{self.group_size}"
        return f"w{self.bits}a{self.row_bits}{group}{_MINIMUMS if self.has_minimums else ''}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """None if it is the name of something else."""
        for bits, row_bits in _INTEGERS.values():
            for group_size in (None, *_GROUP_SIZES):
                for has_minimums in (False, True):
                    integers = cls(bits, row_bits, group_size, has_minimums)
                    if integers.name == name:
                        return integers
        return None


_INTEGERS: Final[Mapping[str, tuple[Literal[4, 8], Literal[8, 16]]]] = {
    QuantAlgo.W8A16: (8, 16),
    QuantAlgo.W4A16: (4, 16),
    QuantAlgo.INT8: (8, 8),
    QuantAlgo.W4A8_QSERVE_PER_GROUP: (4, 8),
}
_GROUP_SIZES: Final = (16, 32, 64, 128)
_GROUP_SIZE_OF_4_BITS: Final = 32
_MINIMUMS: Final = "_min"


class QuantConfig(StrictBaseModel):
    """How weights are quantized while they are loaded, and the KV cache."""

    refused: ClassVar[Mapping[str, Refusal]] = QUANT

    quant_algo: (
        Literal["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W8A16", "W4A16", "INT8", "W4A8_QSERVE_PER_GROUP"] | None
    ) = Field(
        None,
        status="prototype",
        description="Both FP8 names: weights of the layers' products in 8-bit floats (e4m3) with a scale per output "
        "channel, their inputs with a scale per token; embedding and output head stay as they are. "
        "'W8A16', integers of 8 bits with a scale per output channel; 'W4A16', of 4 bits with a scale per "
        "`group_size` inputs; 'INT8' and 'W4A8_QSERVE_PER_GROUP', the same, with inputs rounded to 8 bits in blocks, "
        "which is faster for prompts and large batches, on CPUs. The output head has 8 bits then, the embedding stays "
        "as it is. None: nothing is quantized.",
    )
    group_size: Literal[16, 32, 64, 128] | None = Field(
        None,
        status="prototype",
        description="Inputs of an output that have a scale in common, of integers. Default: 32 of 4 bits, all inputs "
        "of 8 bits.",
    )
    has_zero_point: bool = Field(
        False,
        status="prototype",
        description="Of integers of 4 bits: a minimum beside each scale: 16 bits more per group, and more accurate.",
    )
    kv_cache_quant_algo: Literal["FP8"] | None = Field(
        None, status="prototype", description="'FP8': the same as kv_cache_config.dtype 'fp8'."
    )

    @model_validator(mode="after")
    def _check_integers(self) -> Self:
        if self.quant_algo not in _INTEGERS and self.group_size not in (None, 128):
            raise ValueError(f"group_size is {self.group_size}; it is for integers: {', '.join(_INTEGERS)}")
        if self.has_zero_point and (self.quant_algo is None or _INTEGERS.get(self.quant_algo, (8,))[0] != 4):
            raise ValueError(f"has_zero_point is for integers of 4 bits; quant_algo is {self.quant_algo!r}")
        return self


def weight_quantization(config: QuantConfig | None) -> str | None:
    """How weights are quantized while they are loaded, as an engine directory records it: 'fp8', or the name of
    `IntegerWeights`."""
    if config is None or config.quant_algo is None:
        return None
    if config.quant_algo not in _INTEGERS:
        return "fp8"
    bits, row_bits = _INTEGERS[config.quant_algo]
    default = _GROUP_SIZE_OF_4_BITS if bits == 4 else None
    return IntegerWeights(bits, row_bits, config.group_size or default, config.has_zero_point).name
