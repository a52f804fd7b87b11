"""`LayerBuilder`: makes the parts of one layer out of one rank's share of the weights.

A family's layers call it with the names of a checkpoint's tensors and their sizes over all ranks; which heads, rows and
columns this rank keeps is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tensorweave.cluster.mesh import MeshRank
from tensorweave.kernels.heads.reference import HeadNorms
from tensorweave.kernels.operations import Operations
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.models.adapter_sites import LinearForms, SitePart, column_site
from tensorweave.workers.models.decoder_layer import Attention, GatedMlp, Projection
from tensorweave.workers.models.layers import ColumnForm, RmsNorm, RowForm
from tensorweave.workers.models.normed_projection import NormedProjection, PartNorm
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
    linears: LinearForms

    def norm(self, name: str) -> RmsNorm:
        """Over the hidden states."""
        weight_D = self.weights.vector(self._full(f"{name}.weight"), self.sizes.hidden_size)
        return RmsNorm(self.operations.add_rms_norm, weight_D, self.sizes.norm_epsilon, self.sizes.norm_offset)

    def head_norms(self, name: str) -> HeadNorms:
        """RMSNorms of each query head and of each key head, as Qwen3 names them."""
        query_H, key_H = (
            self.weights.vector(self._full(f"{name}.{kind}_norm.weight"), self.sizes.head_dim) for kind in "qk"
        )
        return HeadNorms(query_H, key_H, self.sizes.norm_epsilon, self.sizes.norm_offset)

    def attention(
        self,
        name: str,
        kv: LayerKv,
        *,
        has_output_bias: bool,
        has_qkv_bias: bool = False,
        qkv: Projection | None = None,
        norms: HeadNorms | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        has_neighbours: bool = False,
        has_sinks: bool = False,
    ) -> Attention:
        """Attention with o_proj and, unless another projection is given, q_proj, k_proj and v_proj in one product.
        `scale` is head_dim ** -0.5 where it is None; sinks are a tensor of that name."""
        query = self._query_rows(kv)
        return Attention(
            qkv=qkv or self.qkv(name, kv, has_bias=has_qkv_bias),
            place_heads=self.operations.place_heads,
            output=self.row_linear(
                f"{name}.o_proj", self.sizes.num_heads * kv.head_dim, query, has_bias=has_output_bias
            ),
            norms=norms,
            head_dim=kv.head_dim,
            window=kv.window,
            scale=kv.head_dim**-0.5 if scale is None else scale,
            rope=kv.rope,
            has_neighbours=has_neighbours,
            soft_cap=soft_cap,
            sinks_N=self._sinks(f"{name}.sinks", kv) if has_sinks else None,
        )

    def qkv(self, name: str, kv: LayerKv, *, has_bias: bool) -> ColumnForm:
        """q_proj, k_proj and v_proj in one product."""
        query, keys = self._query_rows(kv), self._key_rows(kv)
        num_query, num_keys = self.sizes.num_heads * kv.head_dim, kv.num_heads * kv.head_dim
        parts = [
            LinearRows(f"{name}.q_proj", num_query, query),
            LinearRows(f"{name}.k_proj", num_keys, keys),
            LinearRows(f"{name}.v_proj", num_keys, keys),
        ]
        return self.column_linear(parts, has_bias=has_bias)

    def fused_qkv(self, name: str, kv: LayerKv) -> ColumnForm:
        """One tensor qkv_proj: all queries, all keys, all values."""
        query, keys = self._query_rows(kv), self._key_rows(kv)
        num_query, num_keys = self.sizes.num_heads * kv.head_dim, kv.num_heads * kv.head_dim
        firsts = ((query, 0), (keys, num_query), (keys, num_query + num_keys))
        return self._parts_of_one(f"{name}.qkv_proj", num_query + 2 * num_keys, firsts)

    def normed_qkv(self, name: str, kv: LayerKv, *, has_bias: bool) -> NormedProjection:
        """q_proj, k_proj, v_proj, and q_norm and k_norm over all heads together."""
        query, keys = self._query_rows(kv), self._key_rows(kv)
        num_query, num_keys = self.sizes.num_heads * kv.head_dim, kv.num_heads * kv.head_dim
        projection = self.qkv(name, kv, has_bias=has_bias)
        query_norm = self._part_norm(f"{name}.q_norm", num_query, query)
        key_norm = self._part_norm(f"{name}.k_norm", num_keys, keys)
        epsilon, norm = self.sizes.norm_epsilon, self.operations.split_norm
        return NormedProjection(projection, query_norm, key_norm, self._owned_keys(kv), epsilon, norm, self.comm)

    def gated_mlp(self, name: str, *, has_bias: bool = False, has_gelu: bool = False) -> GatedMlp:
        """An MLP with gate_proj, up_proj and down_proj, the first two in one product."""
        width = self.sizes.intermediate_size
        parts = [LinearRows(f"{name}.{part}_proj", width, self.share(width)) for part in ("gate", "up")]
        gate_up = self.column_linear(parts, has_bias=has_bias)
        return self._mlp(gate_up, f"{name}.down_proj", has_bias=has_bias, has_gelu=has_gelu)

    def fused_mlp(self, name: str, gate_up: str = "gate_up_proj", down: str = "down_proj") -> GatedMlp:
        """All gates and all ups are in one tensor."""
        width = self.sizes.intermediate_size
        share = self.share(width)
        linear = self._parts_of_one(f"{name}.{gate_up}", 2 * width, ((share, 0), (share, width)))
        return self._mlp(linear, f"{name}.{down}", has_bias=False, has_gelu=False)

    def _mlp(self, gate_up: ColumnForm, down: str, *, has_bias: bool, has_gelu: bool) -> GatedMlp:
        width = self.sizes.intermediate_size
        return GatedMlp(
            gate_up=gate_up,
            activate=self.operations.gelu_mul if has_gelu else self.operations.silu_mul,
            down=self.row_linear(down, width, self.share(width), has_bias=has_bias),
        )

    def column_linear(self, parts: Sequence[LinearRows], *, has_bias: bool) -> ColumnForm:
        """A product of the hidden states, which returns the outputs of all parts one after the other."""
        D = self.sizes.hidden_size
        weight_OD = self.weights.matrix_rows([self._rows(part, "weight", D) for part in parts])
        bias_O = self.weights.rows([self._rows(part, "bias") for part in parts]) if has_bias else None
        site = column_site([(self._full(part.name), part.num_outputs, part.rows) for part in parts], D)
        return self.linears.column(self.operations.make_linear(weight_OD, bias_O), site)

    def row_linear(self, name: str, num_inputs: int, columns: range, *, has_bias: bool) -> RowForm:
        """Back to hidden states, from this rank's `columns` of all `num_inputs`."""
        D = self.sizes.hidden_size
        weight_DJ = self.weights.matrix_columns(self._full(f"{name}.weight"), (D, num_inputs), columns)
        keeps_bias = has_bias and self.place.tensor == 0
        bias_D = self.weights.vector(self._full(f"{name}.bias"), D) if keeps_bias else None
        site = (SitePart(self._full(name), D, num_inputs, range(D), columns, 0),)
        return self.linears.row(self.operations.make_linear(weight_DJ, bias_D), site, self.comm)

    def share(self, total: int) -> range:
        """This rank's part of [0, total)."""
        return split_evenly(total, self.place.mesh.tensor)[self.place.tensor]

    def heads(self, kv: LayerKv) -> HeadShard:
        return shard_heads(self.sizes.num_heads, kv.num_heads, self.place.mesh.tensor)[self.place.tensor]

    def _query_rows(self, kv: LayerKv) -> range:
        heads = self.heads(kv).query
        return range(heads.start * kv.head_dim, heads.stop * kv.head_dim)

    def _key_rows(self, kv: LayerKv) -> range:
        heads = self.heads(kv).kv
        return range(heads.start * kv.head_dim, heads.stop * kv.head_dim)

    def _owned_keys(self, kv: LayerKv) -> slice:
        """The elements of this rank's keys that no rank before it has: KV heads may be on several."""
        heads, group = self.heads(kv), self.sizes.num_heads // kv.num_heads
        first = -(-heads.query.start // group) - heads.kv.start
        return slice(first * kv.head_dim, len(heads.kv) * kv.head_dim)

    def _part_norm(self, name: str, width: int, rows: range) -> PartNorm:
        return PartNorm(self.weights.rows([TensorRows(self._full(f"{name}.weight"), (width,), rows)]), width)

    def _sinks(self, name: str, kv: LayerKv) -> Tensor:
        rows = TensorRows(self._full(name), (self.sizes.num_heads,), self.heads(kv).query)
        return self.weights.rows([rows]).float()

    def _parts_of_one(self, name: str, num_outputs: int, parts: Sequence[tuple[range, int]]) -> ColumnForm:
        """Rows of one tensor, each range from an offset on."""
        rows = [range(part.start + first, part.stop + first) for part, first in parts]
        return self.column_linear([LinearRows(name, num_outputs, each) for each in rows], has_bias=False)

    def _rows(self, part: LinearRows, kind: str, *columns: int) -> TensorRows:
        return TensorRows(self._full(f"{part.name}.{kind}"), (part.num_outputs, *columns), part.rows)

    def _full(self, name: str) -> str:
        return f"{self.prefix}.{name}"
