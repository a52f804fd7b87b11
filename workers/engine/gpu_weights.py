"""Which weights a GPU does not compute, whatever the kernels of the device engine have for the model."""

from __future__ import annotations

import torch

from tensorweave.cluster.quant_config import IntegerWeights
from tensorweave.workers.gang.device import check_fp8
from tensorweave.workers.models.config import ModelConfig

_ROW_BITS = 16


def check_gpu_weights(
    config: ModelConfig, quantization: str | None, device: torch.device, *, is_on_device: bool
) -> None:
    """Raises ValueError for what is computed on CPUs alone; the message names it.

    Args:
        quantization: a name as `weight_quantization` returns it.
        is_on_device: whether a device engine computes the model.
    """
    if config.sizes.experts is not None:
        _check_experts(config, quantization, is_on_device=is_on_device)
    if config.quantization is not None:
        _check_checkpoint(config.quantization.method, is_on_device=is_on_device)
    integers = None if quantization is None else IntegerWeights.parse(quantization)
    if integers is None:
        if quantization is not None:
            check_fp8(device)
        return
    if not is_on_device:
        raise ValueError(f"weights in integers ({quantization}) have no kernels on this GPU for this model")
    if integers.row_bits != _ROW_BITS:
        raise ValueError(
            f"weights in integers whose inputs are rounded to 8 bits ({quantization}) are for CPUs; on a GPU use "
            f"quant_algo W4A16, W8A16 or FP8"
        )


def _check_experts(config: ModelConfig, quantization: str | None, *, is_on_device: bool) -> None:
    what = f"{config.architecture} is a mixture of experts"
    if not is_on_device:
        raise ValueError(f"{what}, whose experts PyTorch alone does not compute on a GPU: set device to 'cpu'")
    if quantization is not None:
        raise ValueError(f"{what}: on a GPU its weights are not quantized; leave quant_config.quant_algo out")
    if config.quantization is not None:
        raise ValueError(f"{what} that comes quantized, which is computed on CPUs so far: set device to 'cpu'")


def _check_checkpoint(method: str, *, is_on_device: bool) -> None:
    where = f"the checkpoint comes quantized (quant_method {method!r})"
    if method == "gguf":
        raise ValueError(f"{where}: GGUF files are computed on CPUs so far: set device to 'cpu'")
    if not is_on_device:
        raise ValueError(f"{where}, and there are no kernels for the model on this GPU: set device to 'cpu'")
