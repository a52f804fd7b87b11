"""`StepBuffers`: where a step's intermediate results are kept, at addresses that do not change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.ranks.sums import RankSums
from tensorweave.workers.models.device.model import DeviceModel

# T tokens of the largest step, R most rows that sample, D hidden size, X = N + 2 K heads, H head dim
# I intermediate width, V vocabulary, B blocks, P tokens per block, C = 2 K planes of a KV block


@dataclass(frozen=True, slots=True)
class LayerBuffers:
    """What a layer's kernels leave each other, for some number of tokens.

    `part_TD` is what this rank adds to the residual before the ranks sum it; it has no rows where a model is whole.
    `places_T` are those of the tokens' adapters, -1: none.
    """

    x_TD: Tensor
    normed_TD: Tensor
    part_TD: Tensor
    heads_TXH: Tensor
    attended_TNH: Tensor
    gated_TI: Tensor
    places_T: Tensor

    @classmethod
    def create(cls, model: DeviceModel, num_tokens: int, sums: RankSums | None) -> LayerBuffers:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_tokens, *shape, dtype=model.dtype, device=model.device)

        D, H = model.hidden_size, model.head_dim
        no_part_TD = torch.zeros(0, D, dtype=model.dtype, device=model.device)
        return cls(
            x_TD=zeros(D) if sums is None else sums.empty(num_tokens),
            normed_TD=zeros(D) if sums is None else sums.empty(num_tokens),
            part_TD=no_part_TD if sums is None else sums.empty(num_tokens),
            heads_TXH=zeros(model.num_placed_heads, H),
            attended_TNH=zeros(model.num_heads, H),
            gated_TI=zeros(model.intermediate_size),
            places_T=torch.full((num_tokens,), -1, dtype=torch.int32, device=model.device),
        )

    def first(self, num_tokens: int) -> LayerBuffers:
        """The buffers of the first tokens."""
        parts = (self.x_TD, self.normed_TD, self.part_TD, self.heads_TXH, self.attended_TNH, self.gated_TI)
        return LayerBuffers(*(part[:num_tokens] for part in (*parts, self.places_T)))

    def keys_and_values(self, cache_BCPH: Tensor) -> Tensor:
        """Room for the tokens' keys and values of a layer of which nothing else is computed, [T, C, H]: part of the
        memory of `heads_TXH`."""
        num_tokens, C, H = len(self.heads_TXH), cache_BCPH.shape[1], cache_BCPH.shape[3]
        return self.heads_TXH.view(-1)[: num_tokens * C * H].view(num_tokens, C, H)


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """Steps are computed one after the other, so all of them share these: each takes the first rows.

    `sampled` is for the rows that sample alone, where a layer is computed for no others.
    """

    tokens_T: Tensor
    all: LayerBuffers
    sampled: LayerBuffers
    logits_RV: Tensor

    def embed(self, model: DeviceModel, num_tokens: int) -> LayerBuffers:
        """Buffers of the first tokens, x of which is the embedding of `tokens_T`."""
        part = self.all.first(num_tokens)
        torch.index_select(model.embedding_VD, 0, self.tokens_T[:num_tokens], out=part.x_TD)
        return part

    @property
    def max_tokens(self) -> int:
        return self.tokens_T.shape[0]

    @property
    def max_rows(self) -> int:
        return self.logits_RV.shape[0]

    @classmethod
    def create(cls, model: DeviceModel, max_tokens: int, max_rows: int, sums: RankSums | None = None) -> StepBuffers:
        """`sums`: of a model that is split over ranks."""
        return cls(
            tokens_T=torch.zeros(max_tokens, dtype=torch.int32, device=model.device),
            all=LayerBuffers.create(model, max_tokens, sums),
            sampled=LayerBuffers.create(model, max_rows, sums),
            logits_RV=torch.zeros(max_rows, model.vocab_size, dtype=torch.float32, device=model.device),
        )
