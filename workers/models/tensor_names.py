"""Names of the tensors outside a model's layers, alike in every family."""

from __future__ import annotations

from typing import Final

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
FINAL_NORM: Final = "model.norm.weight"
