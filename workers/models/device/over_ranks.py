"""What `SplitLayers` does not compute of a model that is split over ranks."""

from __future__ import annotations

from typing import Final

from tensorweave.kernels.linear.reference import GroupedFloatLinear, GroupedLinear, Linear
from tensorweave.workers.models.decoder_layer import DecoderLayer, GatedMlp
from tensorweave.workers.models.layers import ColumnLinear, RmsNorm

GROUPS_OVER_RANKS: Final = "weights in integers or groups over several ranks"


def missing_over_ranks(layer: DecoderLayer) -> str | None:
    """What ranks cannot share of a layer that one rank computes. None: nothing is missing."""
    attention, mlp = layer.attention, layer.mlp
    if not isinstance(mlp, GatedMlp):
        return "experts over several ranks"
    if not isinstance(attention.qkv, ColumnLinear):
        return "adapters over several ranks"
    if isinstance(layer.after_attention, RmsNorm) or isinstance(layer.after_mlp, RmsNorm):
        return "norms behind attention and MLP over several ranks"
    linears = (attention.qkv.linear, attention.output.linear, mlp.gate_up.linear, mlp.down.linear)
    return GROUPS_OVER_RANKS if any(is_grouped(linear) for linear in linears) else None


def is_grouped(linear: Linear) -> bool:
    return isinstance(linear, GroupedLinear | GroupedFloatLinear)
