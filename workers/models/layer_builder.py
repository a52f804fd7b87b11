"""`LayerBuilder`: makes the parts of one layer out of one rank's share of the weights.

A family's layers call it with the names of a checkpoint's tensors and their sizes over all ranks; which heads, rows and
columns this rank keeps is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensorweave.cluster.mesh import MeshRank
from tensorweave.kernels.heads.reference import HeadNorms
from tensorweave.kernels.operations import Operations
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.models.decoder_layer import Attention, GatedMlp
from tensorweave.workers.models.layers import ColumnLinear, RmsNorm, RowLinear
from tensorweave.workers.models.rank_weights import RankWeights, TensorRows
from tensorweave.workers.models.shards import HeadShard, shard_heads, split_evenly
from tensorweave.workers.models.sizes import LayerKv, ModelSizes


@dataclass(frozen=True, slots=True)
class LinearRows:
    """The output rows of one linear layer of a checkpoint that this rank keeps. `name` is without '.weight'."""

    name: str
    num_outputs: int
    rows: range


@dataclass(frozen=True, slots=True)
class LayerBuilder:
    """`prefix` begins the names of the layer's tensors, as in 'model.layers.3'."""

    prefix: str
    sizes: ModelSizes
    weights: RankWeights
    place: MeshRank
    comm: Comm
    operations: Operations

    def norm(self, name: str) -> RmsNorm:
        """Over the hidden states."""
        weight_D = self.weights.vector(self._full(f"{name}.weight"), self.sizes.hidden_size)
        return RmsNorm(self.operations.add_rms_norm, weight_D, self.sizes.norm_epsilon)

    def head_norms(self, name: str) -> HeadNorms:
        """RMSNorms of each query head and of each key head, as Qwen3 names them."""
        query_H, key_H = (
            self.weights.vector(self._full(f"{name}.{kind}_norm.weight"), self.sizes.head_dim) for kind in "qk"
        )
        return HeadNorms(query_H, key_H, self.sizes.norm_epsilon)

    def attention(
        self, name: str, kv: LayerKv, *, has_qkv_bias: bool, has_output_bias: bool, norms: HeadNorms | None = None
    ) -> Attention:
        """With q_proj, k_proj, v_proj and o_proj, the first three in one product."""
        H, heads = kv.head_dim, self.heads(kv)
        query, keys = (range(part.start * H, part.stop * H) for part in (heads.query, heads.kv))
        num_query, num_keys = self.sizes.num_heads * H, kv.num_heads * H
        parts = [
            LinearRows(f"{name}.q_proj", num_query, query),
            LinearRows(f"{name}.k_proj", num_keys, keys),
            LinearRows(f"{name}.v_proj", num_keys, keys),
        ]
        return Attention(
            qkv=self.column_linear(parts, has_bias=has_qkv_bias),
            place_heads=self.operations.place_heads,
            output=self.row_linear(f"{name}.o_proj", num_query, query, has_bias=has_output_bias),
            norms=norms,
            head_dim=H,
            window=kv.window,
        )

    def gated_mlp(self, name: str, *, has_bias: bool) -> GatedMlp:
        """With gate_proj, up_proj and down_proj, the first two in one product."""
        width = self.sizes.intermediate_size
        rows = self.share(width)
        parts = [LinearRows(f"{name}.{part}_proj", width, rows) for part in ("gate", "up")]
        return GatedMlp(
            gate_up=self.column_linear(parts, has_bias=has_bias),
            activate=self.operations.silu_mul,
            down=self.row_linear(f"{name}.down_proj", width, rows, has_bias=has_bias),
        )

    def column_linear(self, parts: Sequence[LinearRows], *, has_bias: bool) -> ColumnLinear:
        """Of the hidden states: the outputs of all parts one after the other, from one product."""
        D = self.sizes.hidden_size
        weight_OD = self.weights.matrix_rows([self._rows(part, "weight", D) for part in parts])
        bias_O = self.weights.rows([self._rows(part, "bias") for part in parts]) if has_bias else None
        return ColumnLinear(self.operations.make_linear(weight_OD, bias_O))

    def row_linear(self, name: str, num_inputs: int, columns: range, *, has_bias: bool) -> RowLinear:
        """Back to hidden states, from this rank's `columns` of all `num_inputs`."""
        D = self.sizes.hidden_size
        weight_DJ = self.weights.matrix_columns(self._full(f"{name}.weight"), (D, num_inputs), columns)
        keeps_bias = has_bias and self.place.tensor == 0
        bias_D = self.weights.vector(self._full(f"{name}.bias"), D) if keeps_bias else None
        return RowLinear(self.operations.make_linear(weight_DJ, bias_D), self.comm)

    def share(self, total: int) -> range:
        """This rank's part of [0, total)."""
        return split_evenly(total, self.place.mesh.tensor)[self.place.tensor]

    def heads(self, kv: LayerKv) -> HeadShard:
        return shard_heads(self.sizes.num_heads, kv.num_heads, self.place.mesh.tensor)[self.place.tensor]

    def _rows(self, part: LinearRows, kind: str, *columns: int) -> TensorRows:
        return TensorRows(self._full(f"{part.name}.{kind}"), (part.num_outputs, *columns), part.rows)

    def _full(self, name: str) -> str:
        return f"{self.prefix}.{name}"
