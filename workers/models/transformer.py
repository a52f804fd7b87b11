"""The decoder-only transformer of Llama, Mistral, Qwen2 and Qwen3 over a packed batch of tokens.

Written as one GPU's mathematics; which heads, columns and words are here is decided by `shards`, and what ranks
exchange by the layers. The engine calls `forward`, then `logits` for the rows that need them.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tensorweave.kernels.activation.reference import silu_mul
from tensorweave.kernels.attention.torch_backend import AttentionPlan, paged_attention
from tensorweave.kernels.heads.reference import HeadNorms, WriteSlots, place_heads
from tensorweave.kernels.linear.reference import make_linear
from tensorweave.kernels.native.layers import LayerWeights, NativeLayers, native_layers
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.layers import ColumnLinear, OutputHead, RmsNorm, RowLinear, VocabEmbedding
from tensorweave.workers.models.loader import EMBEDDING, FINAL_NORM, HEAD, RankWeights
from tensorweave.workers.models.shards import RankShard

# T tokens, D hidden size, N query heads and K KV heads of this rank, H head dim, C = 2 K planes of a KV block
# B blocks, P tokens a block, R rows of logits, V vocabulary


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """A packed batch on the device. `plans` has one entry for each distinct window of the model's layers."""

    token_ids_T: Tensor
    rope_table_TH: Tensor
    write: WriteSlots
    plans: Mapping[int | None, AttentionPlan]


@dataclass(frozen=True, slots=True)
class Attention:
    """`qkv` gives N query heads, K keys and K values, in that order, from one matrix product."""

    qkv: ColumnLinear
    output: RowLinear
    norms: HeadNorms | None
    head_dim: int
    window: int | None

    def __call__(self, x_TD: Tensor, batch: ForwardInputs, cache_BCPH: Tensor) -> Tensor:
        heads_TXH = self.qkv(x_TD).view(x_TD.shape[0], -1, self.head_dim)
        q_TNH = place_heads(heads_TXH, batch.rope_table_TH, cache_BCPH, batch.write, self.norms)
        out_TNH = paged_attention(q_TNH, cache_BCPH, batch.plans[self.window], self.head_dim**-0.5)
        return self.output(out_TNH.flatten(1))


@dataclass(frozen=True, slots=True)
class GatedMlp:
    gate_up: ColumnLinear
    down: RowLinear

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.down(silu_mul(self.gate_up(x_TD)))


@dataclass(frozen=True, slots=True)
class Block:
    attention_norm: RmsNorm
    attention: Attention
    mlp_norm: RmsNorm
    mlp: GatedMlp

    def __call__(self, x_TD: Tensor, update_TD: Tensor | None, batch: ForwardInputs, cache_BCPH: Tensor) -> Tensor:
        """Adds the last block's update to the residual stream, in place, and gives its own."""
        attended_TD = self.attention(self.attention_norm(x_TD, update_TD), batch, cache_BCPH)
        return self.mlp(self.mlp_norm(x_TD, attended_TD))


@dataclass(frozen=True, slots=True)
class Transformer:
    """One rank's share of a model. `native`, if there, computes what `blocks` do, with the same bits."""

    embedding: VocabEmbedding
    blocks: tuple[Block, ...]
    final_norm: RmsNorm
    head: OutputHead
    native: NativeLayers | None
    _num_done: array[int] = field(default_factory=lambda: array("q", [0]), repr=False)

    @property
    def num_layers_done(self) -> int:
        """Since the start. Any thread may look, also during a forward."""
        return self._num_done[0] if self.native is None else self.native.num_done

    def forward(self, batch: ForwardInputs, caches: Sequence[Tensor]) -> Tensor:
        """Hidden states [T, D] before the final norm; keys and values go into `caches`, one [B, C, P, H] a layer."""
        x_TD = self.embedding(batch.token_ids_T)
        if self.native is not None:
            return self.native(x_TD, batch.rope_table_TH, batch.write, batch.plans, caches)
        update_TD = None
        for block, cache_BCPH in zip(self.blocks, caches, strict=True):
            update_TD = block(x_TD, update_TD, batch, cache_BCPH)
            self._num_done[0] += 1
        return x_TD if update_TD is None else x_TD + update_TD

    def logits(self, x_RD: Tensor) -> Tensor:
        """[R, V] float32, the whole vocabulary on every rank."""
        return self.head(self.final_norm(x_RD))


def build_transformer(config: ModelConfig, shard: RankShard, load: RankWeights, comm: Comm) -> Transformer:
    """Read one rank's share of the weights and put the layers around it."""
    embedding_VD = load.rows([(EMBEDDING, shard.vocab)])
    blocks = tuple(_build_block(config, shard, load, comm, layer) for layer in range(config.num_layers))
    is_tied = config.has_tied_embeddings
    head_VD = load.tied_head(embedding_VD) if is_tied else load.matrix_rows([(HEAD, shard.vocab)])
    return Transformer(
        embedding=VocabEmbedding(embedding_VD, shard.vocab.start, comm),
        blocks=blocks,
        final_norm=RmsNorm(load.vector(FINAL_NORM), config.rms_norm_eps),
        head=OutputHead(make_linear(head_VD), shard.vocab_sizes, comm),
        native=_native_layers(config, blocks) if comm.size == 1 else None,
    )


def _native_layers(config: ModelConfig, blocks: Sequence[Block]) -> NativeLayers | None:
    layers = [
        LayerWeights(
            block.attention_norm.weight_D,
            block.attention.qkv.linear,
            block.attention.norms,
            block.attention.output.linear,
            block.mlp_norm.weight_D,
            block.mlp.gate_up.linear,
            block.mlp.down.linear,
            block.attention.window,
        )
        for block in blocks
    ]
    return native_layers(layers, config.head_dim, config.rms_norm_eps)


def _build_block(config: ModelConfig, shard: RankShard, load: RankWeights, comm: Comm, layer: int) -> Block:
    prefix = f"model.layers.{layer}"
    gate_up = [(f"{prefix}.mlp.{name}", shard.intermediate) for name in ("gate_proj", "up_proj")]
    return Block(
        attention_norm=RmsNorm(load.vector(f"{prefix}.input_layernorm.weight"), config.rms_norm_eps),
        attention=_build_attention(config, shard, load, comm, layer),
        mlp_norm=RmsNorm(load.vector(f"{prefix}.post_attention_layernorm.weight"), config.rms_norm_eps),
        mlp=GatedMlp(
            gate_up=_column_linear(load, gate_up, config.has_mlp_bias),
            down=_row_linear(load, f"{prefix}.mlp.down_proj", shard.intermediate, config.has_mlp_bias, comm),
        ),
    )


def _build_attention(config: ModelConfig, shard: RankShard, load: RankWeights, comm: Comm, layer: int) -> Attention:
    prefix, H = f"model.layers.{layer}.self_attn", config.head_dim
    query, kv = (range(heads.start * H, heads.stop * H) for heads in (shard.heads.query, shard.heads.kv))
    parts = [(f"{prefix}.q_proj", query), (f"{prefix}.k_proj", kv), (f"{prefix}.v_proj", kv)]
    norms = None
    if config.has_qk_norm:
        weights = load.vector(f"{prefix}.q_norm.weight"), load.vector(f"{prefix}.k_norm.weight")
        norms = HeadNorms(*weights, config.rms_norm_eps)
    return Attention(
        qkv=_column_linear(load, parts, config.has_qkv_bias),
        output=_row_linear(load, f"{prefix}.o_proj", query, config.has_output_bias, comm),
        norms=norms,
        head_dim=H,
        window=config.windows[layer],
    )


def _column_linear(load: RankWeights, parts: Sequence[tuple[str, range]], has_bias: bool) -> ColumnLinear:
    weight_OD = load.matrix_rows([(f"{name}.weight", rows) for name, rows in parts])
    bias_O = load.rows([(f"{name}.bias", rows) for name, rows in parts]) if has_bias else None
    return ColumnLinear(make_linear(weight_OD, bias_O))


def _row_linear(load: RankWeights, name: str, columns: range, has_bias: bool, comm: Comm) -> RowLinear:
    bias_D = load.vector(f"{name}.bias") if has_bias and comm.rank == 0 else None
    return RowLinear(make_linear(load.matrix_columns(f"{name}.weight", columns), bias_D), comm)
