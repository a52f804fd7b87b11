"""The slow twin of the decoder's choice: one row of logits, plain numpy."""

from __future__ import annotations

import numpy as np

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.kernels.sample.rule import GREATEST_TEMPERATURE, LEAST_TEMPERATURE
from tests.kernels.sample.plain_rule import Logits, keys_of, limit_of, scores_of


def chosen(logits: Logits, spec: SamplingSpec, top_p: float, position: int) -> int:
    """Temperature, min-p, top-k, top-p, then the largest of logit + temperature * g."""
    if spec.is_greedy or spec.top_k == 1:
        return int(np.argmax(logits))
    temperature = float(np.clip(spec.temperature, LEAST_TEMPERATURE, GREATEST_TEMPERATURE))
    limit = limit_of(logits, temperature, spec.top_k, top_p, spec.min_p)
    scores = scores_of(logits, temperature, spec.seed, position)
    return int(np.argmax(np.where(keys_of(logits, temperature) <= limit, scores, -np.inf)))
