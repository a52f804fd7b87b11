"""Tensors that a checkpoint need not have because its config.json determines them: they must be what that says."""

from __future__ import annotations

from typing import Final

import torch

from tensorweave.workers.models.checkpoint import WeightSource
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.rope_config import RopeConfig
from tensorweave.workers.models.rotary import inverse_frequencies
from tensorweave.workers.models.tensor_names import EMBEDDING, HEAD

ROTATION_SUFFIX: Final = "rotary_emb.inv_freq"
"""Buffers that old checkpoints carry."""
_BF16_RTOL, _F16_ATOL = 2**-7, 1e-7
_COMPARED_ELEMENTS = 1 << 24


def redundant_tensors(config: ModelConfig) -> tuple[str, ...]:
    """Names, and endings of names, of tensors that a checkpoint of this model may have."""
    return (ROTATION_SUFFIX, HEAD) if config.has_tied_embeddings else (ROTATION_SUFFIX,)


def check_redundant_tensors(source: WeightSource, config: ModelConfig) -> None:
    """Where a tied model has a head that differs from its embedding, transformers 5 takes the head, transformers 4 and
    vLLM take the embedding; neither is taken here without a word.

    Raises:
        ValueError: names the tensor.
    """
    if config.has_tied_embeddings and HEAD in source.shapes and not _are_equal(source, EMBEDDING, HEAD):
        raise ValueError(
            f"the checkpoint's {HEAD} differs from {EMBEDDING}, and config.json says tie_word_embeddings true: set it "
            f"to false to use the head, or take the head out of the checkpoint"
        )
    ropes = [each for rope in config.ropes for each in (rope, RopeConfig(theta=rope.theta, part=rope.part))]
    allowed = [inverse_frequencies(each, config.sizes.head_dim) for each in ropes]
    for name in source.shapes:
        if name.endswith(ROTATION_SUFFIX):
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
