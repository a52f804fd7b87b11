"""From a weight source to one rank's layers: which tensors a model must have, and which parts a rank keeps.

Rows of fused matrices are read straight into their final place, so loading needs a rank's share and one slice besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tensorweave.kernels.weights import PackedWeight
from tensorweave.workers.models.checkpoint import Shapes, WeightSource
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.rope_config import RopeConfig
from tensorweave.workers.models.rotary import inverse_frequencies

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
# Buffers that old checkpoints carry and that the config determines.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
_BF16_RTOL, _F16_ATOL = 2**-7, 1e-7
_COMPARED_ELEMENTS = 1 << 24


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Every tensor that a checkpoint of this model must have."""
    D, I, V = config.hidden_size, config.intermediate_size, config.vocab_size  # noqa: E741
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = {
        "self_attn.q_proj": (query, D, config.has_qkv_bias),
        "self_attn.k_proj": (kv, D, config.has_qkv_bias),
        "self_attn.v_proj": (kv, D, config.has_qkv_bias),
        "self_attn.o_proj": (D, query, config.has_output_bias),
        "mlp.gate_proj": (I, D, config.has_mlp_bias),
        "mlp.up_proj": (I, D, config.has_mlp_bias),
        "mlp.down_proj": (D, I, config.has_mlp_bias),
    }
    norms = {"input_layernorm": D, "post_attention_layernorm": D}
    if config.has_qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, D), FINAL_NORM: (D,)}
    if not config.has_tied_embeddings:
        shapes[HEAD] = (V, D)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns, has_bias) in matrices.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        shapes |= {f"{prefix}.{name}.weight": (size,) for name, size in norms.items()}
    return shapes


def check_determined(source: WeightSource, config: ModelConfig) -> None:
    """What a checkpoint need not have, for the config determines it, must be what the config says where it is there.

    Of a tied model's own head, transformers 5 takes the head where it differs, transformers 4 and vLLM the embedding;
    so neither is taken in silence.

    Raises:
        ValueError: names the tensor.
    """
    if config.has_tied_embeddings and HEAD in source.shapes and not _are_equal(source, EMBEDDING, HEAD):
        raise ValueError(
            f"the checkpoint's {HEAD} differs from {EMBEDDING}, and config.json says tie_word_embeddings true: set it "
            f"to false to use the head, or take the head out of the checkpoint"
        )
    rope = config.rope
    allowed = [inverse_frequencies(each, config.head_dim) for each in (rope, RopeConfig(theta=rope.theta))]
    for name in source.shapes:
        if name.endswith(IGNORED_SUFFIXES):
            stored = source.read(name).float()
            if not any(
                stored.shape == each.shape and torch.allclose(stored, each, rtol=_BF16_RTOL, atol=_F16_ATOL)
                for each in allowed
            ):
                raise ValueError(f"the checkpoint's {name} is not the rotation that config.json describes")


def _are_equal(source: WeightSource, one: str, other: str) -> bool:
    if source.shapes[one] != source.shapes[other]:
        return False
    num_rows, width = source.shapes[one]
    step = max(1, _COMPARED_ELEMENTS // width)
    pieces = (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
    return all(torch.equal(source.read(one, piece), source.read(other, piece)) for piece in pieces)


class RankWeights(Protocol):
    """One rank's weights, as `build_transformer` asks for them: from a checkpoint, or from an engine directory, where
    they may be packed already."""

    def vector(self, name: str) -> Tensor:
        """All of a norm or a bias."""
        ...

    def rows(self, parts: Sequence[tuple[str, range]]) -> Tensor:
        """The given rows of several matrices (or biases), one below the other."""
        ...

    def matrix_rows(self, parts: Sequence[tuple[str, range]]) -> Tensor | PackedWeight:
        """The same, to multiply with."""
        ...

    def matrix_columns(self, name: str, columns: range) -> Tensor | PackedWeight:
        """The given columns of a matrix, to multiply with."""
        ...

    def tied_head(self, embedding_VD: Tensor) -> Tensor | PackedWeight:
        """The rank's rows of the embedding, to multiply with."""
        ...


@dataclass(frozen=True, slots=True)
class WeightLoader:
    """Reads parts of a checkpoint's tensors into place on one device, in one dtype."""

    source: WeightSource
    dtype: torch.dtype
    device: torch.device

    def vector(self, name: str) -> Tensor:
        return self.source.read(name).to(self.device, self.dtype)

    def rows(self, parts: Sequence[tuple[str, range]]) -> Tensor:
        tail = self.source.shapes[parts[0][0]][1:]
        stacked = torch.empty(sum(len(rows) for _, rows in parts), *tail, dtype=self.dtype, device=self.device)
        start = 0
        for name, rows in parts:
            stacked[start : start + len(rows)].copy_(self.source.read(name, slice(rows.start, rows.stop)))
            start += len(rows)
        return stacked

    def matrix_rows(self, parts: Sequence[tuple[str, range]]) -> Tensor:
        return self.rows(parts)

    def matrix_columns(self, name: str, columns: range) -> Tensor:
        num_rows = self.source.shapes[name][0]
        matrix = torch.empty(num_rows, len(columns), dtype=self.dtype, device=self.device)
        return matrix.copy_(self.source.read(name, slice(0, num_rows), slice(columns.start, columns.stop)))

    def tied_head(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD
