"""`native_form`: one decoder layer as `NativeLayers` computes it, for those that it can compute."""

from __future__ import annotations

from torch import Tensor

from tensorweave.kernels.activation.native import NativeGeluMul, NativeSiluMul
from tensorweave.kernels.native.layers import LayerForm, LayerParts
from tensorweave.workers.models.decoder_layer import DecoderLayer, GatedMlp
from tensorweave.workers.models.layers import (
    AdaptedColumnLinear,
    AdaptedRowLinear,
    ColumnForm,
    ColumnLinear,
    RmsNorm,
    RowForm,
)
from tensorweave.workers.models.residual import OutputChange, Scaled, Unchanged


def native_form(layer: DecoderLayer) -> tuple[LayerParts, LayerForm] | None:
    """The layer's tensors, and what must be alike in all layers of a model; None for a layer of another form."""
    attention, mlp, norm, mlp_norm = layer.attention, layer.mlp, layer.attention_norm, layer.mlp_norm
    if not isinstance(norm, RmsNorm) or not isinstance(mlp_norm, RmsNorm) or not isinstance(mlp, GatedMlp):
        return None
    if not isinstance(attention.qkv, ColumnLinear | AdaptedColumnLinear) or not isinstance(
        mlp.activate, NativeSiluMul | NativeGeluMul
    ):
        return None
    factors = {_factor(layer.after_attention), _factor(layer.after_mlp)}
    norms = [each for each in (norm, mlp_norm, layer.after_attention, layer.after_mlp) if isinstance(each, RmsNorm)]
    kinds = {(each.epsilon, each.offset) for each in norms}
    if attention.norms is not None:
        kinds.add((attention.norms.epsilon, attention.norms.offset))
    if len(factors) != 1 or len(kinds) != 1:
        return None
    parts = LayerParts(
        attention_norm_D=norm.weight_D,
        qkv=attention.qkv.linear,
        head_norms=attention.norms,
        output=attention.output.linear,
        mlp_norm_D=mlp_norm.weight_D,
        gate_up=mlp.gate_up.linear,
        down=mlp.down.linear,
        window=attention.window,
        rope=attention.rope,
        after_attention_D=_weight(layer.after_attention),
        after_mlp_D=_weight(layer.after_mlp),
        sinks_N=attention.sinks_N,
        sites=(_site(attention.qkv), _site(attention.output), _site(mlp.gate_up), _site(mlp.down)),
    )
    [(epsilon, offset)] = kinds
    return parts, LayerForm(
        head_dim=attention.head_dim,
        epsilon=epsilon,
        scale=attention.scale,
        norm_offset=offset,
        soft_cap=attention.soft_cap,
        update_factor=factors.pop(),
        is_gelu=isinstance(mlp.activate, NativeGeluMul),
        has_neighbours=attention.has_neighbours,
    )


def _site(linear: ColumnForm | RowForm) -> int:
    return linear.site if isinstance(linear, AdaptedColumnLinear | AdaptedRowLinear) else 0


def _factor(change: OutputChange) -> float:
    return change.factor if isinstance(change, Scaled) else 1.0


def _weight(change: OutputChange) -> Tensor | None:
    assert isinstance(change, Scaled | Unchanged | RmsNorm)
    return change.weight_D if isinstance(change, RmsNorm) else None
