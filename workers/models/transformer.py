"""The decoder-only transformer of Llama, Mistral, Qwen2 and Qwen3 over a packed batch of tokens.

Written as one GPU's mathematics; which heads, columns and words are here is decided by `layer_builder`, and what ranks
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
from tensorweave.kernels.native.layers import NativeLayers
from tensorweave.workers.models.layers import ColumnLinear, OutputHead, RmsNorm, RowLinear, VocabEmbedding

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
