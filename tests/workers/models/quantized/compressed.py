"""Layouts that the compressed-tensors package itself writes and dequantizes."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from tests.workers.models.quantized.layouts import Layout


def scheme_of(weights: dict[str, Any]) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def compressed(kind: str, weights: dict[str, Any], scale_dtype: torch.dtype = torch.bfloat16) -> Layout:
    """Scales come from the least and the greatest weight of each group, block, output or tensor."""
    scheme, compressor = scheme_of(weights), BaseCompressor.get_value_from_registry(kind)

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        low, high = _extremes(weight, scheme.weights)
        scales, zeros = calculate_qparams(low, high, scheme.weights)
        state = {"weight": weight, "weight_scale": scales.to(scale_dtype)}
        if not weights.get("symmetric", True):
            state["weight_zero_point"] = zeros
        stored = compressor.compress(state, scheme)
        wide = {name: t.double() if t.dtype == scale_dtype else t for name, t in stored.items()}
        return stored, compressor.decompress(wide, scheme)["weight"].float()

    return quantize


def _extremes(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    match args.strategy:
        case "tensor":
            return weight.amin().view(1), weight.amax().view(1)
        case "channel":
            return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "group":
            groups = weight.view(N, -1, args.group_size)
        case _:
            height, width = args.block_structure
            groups = weight.view(N // height, height, K // width, width).transpose(1, 2).flatten(2)
    return groups.amin(-1), groups.amax(-1)
