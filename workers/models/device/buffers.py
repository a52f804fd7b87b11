"""`StepBuffers`: where a step's intermediate results are kept, at addresses that do not change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.workers.models.device.model import DeviceModel

# T tokens of the largest step, R most rows that sample, D hidden size, X = N + 2 K heads, H head dim
# I intermediate width, V vocabulary


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """Steps are computed one after the other, so all of them share these: each takes the first rows."""

    tokens_T: Tensor
    x_TD: Tensor
    normed_TD: Tensor
    update_TD: Tensor
    heads_TXH: Tensor
    attended_TNH: Tensor
    gated_TI: Tensor
    hidden_RD: Tensor
    logits_RV: Tensor

    @property
    def max_tokens(self) -> int:
        return self.x_TD.shape[0]

    @property
    def max_rows(self) -> int:
        return self.logits_RV.shape[0]

    @classmethod
    def create(cls, model: DeviceModel, max_tokens: int, max_rows: int) -> StepBuffers:
        device, dtype, D, H = model.device, model.dtype, model.hidden_size, model.head_dim

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tokens_T=zeros(max_tokens, dtype=torch.int32),
            x_TD=zeros(max_tokens, D),
            normed_TD=zeros(max_tokens, D),
            update_TD=zeros(max_tokens, D),
            heads_TXH=zeros(max_tokens, model.num_placed_heads, H),
            attended_TNH=zeros(max_tokens, model.num_heads, H),
            gated_TI=zeros(max_tokens, model.intermediate_size),
            hidden_RD=zeros(max_rows, D),
            logits_RV=zeros(max_rows, model.vocab_size, dtype=torch.float32),
        )
