"""One layer of a decoder-only transformer: attention and an MLP, which add to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tensorweave.kernels.heads.reference import HeadNorms
from tensorweave.kernels.operations import GatedActivation, PlaceHeads
from tensorweave.workers.models.forward_inputs import ForwardInputs
from tensorweave.workers.models.layers import ColumnForm, RowForm
from tensorweave.workers.models.residual import UNCHANGED, InputNorm, OutputChange

# T tokens, D hidden size, N query heads and K KV heads of this rank, X = N + 2 K, H head dim
# W elements of a head that are rotated
# B blocks, P tokens per block, C = 2 K planes of a KV block


class Projection(Protocol):
    """`ColumnLinear`, or `NormedProjection`."""

    def __call__(self, x_TD: Tensor, inputs: ForwardInputs) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Attention:
    """`qkv` returns N query heads, K keys and K values, in that order, from one matrix product.

    `rope` is the place of the layer's rotation among the model's, `has_neighbours` how its pairs lie (see
    `kernels.heads.rope`); scale, soft cap and sinks are those of `AttentionPlan.attend`.
    """

    qkv: Projection
    place_heads: PlaceHeads
    output: RowForm
    norms: HeadNorms | None
    head_dim: int
    window: int | None
    scale: float
    rope: int = 0
    has_neighbours: bool = False
    soft_cap: float | None = None
    sinks_N: Tensor | None = None

    def __call__(self, x_TD: Tensor, inputs: ForwardInputs, cache_BCPH: Tensor) -> Tensor:
        plan, table_TW = inputs.attention, inputs.rope_tables[self.rope]
        heads_TXH = self.qkv(x_TD, inputs).view(x_TD.shape[0], -1, self.head_dim)
        q_TNH = self.place_heads(
            heads_TXH, table_TW, cache_BCPH, plan.slots, self.norms, has_neighbours=self.has_neighbours
        )
        out_TNH = plan.attend(q_TNH, cache_BCPH, self.window, self.scale, soft_cap=self.soft_cap, sinks_N=self.sinks_N)
        return self.output(out_TNH.flatten(1), inputs)


class Mlp(Protocol):
    """`GatedMlp`, or a mixture of experts."""

    def __call__(self, x_TD: Tensor, inputs: ForwardInputs) -> Tensor:
        """Return a new tensor [T, D], summed over ranks. The layer's normalised input is not changed."""
        ...


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """`gate_up` returns gates, then as many values that they multiply."""

    gate_up: ColumnForm
    activate: GatedActivation
    down: RowForm

    def __call__(self, x_TD: Tensor, inputs: ForwardInputs) -> Tensor:
        return self.down(self.activate(self.gate_up(x_TD, inputs)), inputs)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """`attention_norm` and `mlp_norm` stand before attention and MLP, `after_attention` and `after_mlp` behind them."""

    attention_norm: InputNorm
    attention: Attention
    mlp_norm: InputNorm
    mlp: Mlp
    after_attention: OutputChange = UNCHANGED
    after_mlp: OutputChange = UNCHANGED

    def __call__(self, x_TD: Tensor, update_TD: Tensor | None, inputs: ForwardInputs, cache_BCPH: Tensor) -> Tensor:
        """Add the last layer's update to the residual stream x, in place; return this layer's."""
        attended_TD = self.attention(self.attention_norm(x_TD, update_TD), inputs, cache_BCPH)
        input_TD = self.mlp_norm(x_TD, self.after_attention(attended_TD))
        return self.after_mlp(self.mlp(input_TD, inputs))
