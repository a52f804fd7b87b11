"""A decoder-only transformer over a packed batch of tokens, or one pipeline stage of it.

Written as one GPU's mathematics; which heads, columns and words are on this rank is decided by `layer_builder`, and
what ranks exchange by the layers. The engine calls `forward`, then `logits` for the rows that need them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tensorweave.workers.models.ends import Embedding, Head
from tensorweave.workers.models.forward_inputs import ForwardInputs
from tensorweave.workers.models.layers import RmsNorm
from tensorweave.workers.models.stack import DecoderStack

# T tokens, D hidden size, H head dim, R rows of logits, V vocabulary
# B blocks, P tokens per block, C = 2 K planes of a KV block


@dataclass(frozen=True, slots=True)
class Stage:
    """One rank's share of a pipeline stage. `embedding` returns the states of the stage before, if there is one."""

    embedding: Embedding
    stack: DecoderStack

    @property
    def num_layers_done(self) -> int:
        """Since the start. Any thread may read it, also during a forward."""
        return self.stack.num_layers_done

    def forward(self, inputs: ForwardInputs, caches: Sequence[Tensor]) -> Tensor:
        """Hidden states [T, D] after the layers; keys and values go into `caches`, one [B, C, P, H] per layer."""
        return self.stack(self.embedding(inputs.token_ids_T), inputs, caches)


@dataclass(frozen=True, slots=True)
class Transformer(Stage):
    """One rank's share of a whole model, or of its last pipeline stage: the one that has the output head."""

    final_norm: RmsNorm
    head: Head

    def embeddings(self, x_RD: Tensor) -> Tensor:
        """[R, D] float32: the last hidden states, after the final norm."""
        return self.final_norm(x_RD).float()

    def logits(self, x_RD: Tensor) -> Tensor:
        """[R, V] float32, the whole vocabulary on every rank."""
        return self.head(self.final_norm(x_RD))
