"""What stands around the table of embeddings and the output head where a family has it so: factors, and a soft cap; and
where a later pipeline stage has its input from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tensorweave.workers.gang.stages import StageLink

# T tokens, D hidden size, R rows of logits, V vocabulary


class Embedding(Protocol):
    def __call__(self, token_ids_T: Tensor) -> Tensor: ...


class Head(Protocol):
    def __call__(self, x_RD: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class ScaledEmbedding:
    """Times a factor, which is rounded to the type of the rows, as transformers does."""

    embedding: Embedding
    factor: float

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        x_TD = self.embedding(token_ids_T)
        return x_TD.mul_(x_TD.new_tensor(self.factor))


@dataclass(frozen=True, slots=True)
class StatesFromStage:
    """The hidden states that the stage before has computed for these tokens."""

    stages: StageLink
    hidden_size: int
    dtype: torch.dtype

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        shape = (len(token_ids_T), self.hidden_size)
        return self.stages.receive_states(torch.empty(shape, dtype=self.dtype, device=token_ids_T.device))


@dataclass(frozen=True, slots=True)
class ScaledHead:
    """Logits times a factor; then, with a cap, cap * tanh(logits / cap). In float32."""

    head: Head
    factor: float
    cap: float | None

    def __call__(self, x_RD: Tensor) -> Tensor:
        logits_RV = self.head(x_RD)
        if self.factor != 1.0:
            logits_RV *= self.factor
        return logits_RV if self.cap is None else logits_RV.div_(self.cap).tanh_().mul_(self.cap)
