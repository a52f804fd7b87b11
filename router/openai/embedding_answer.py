"""The answer of /v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import orjson


def encode_embedding(packed: bytes, dimensions: int | None, *, is_base64: bool) -> orjson.Fragment:
    """JSON of the first `dimensions` numbers of a packed float32 vector, with length 1: a list, or base64 of packed
    little-endian float32."""
    vector_D = np.frombuffer(packed, dtype="<f4").astype(np.float64)[:dimensions]
    unit_D = (vector_D / max(float(np.linalg.norm(vector_D)), 1e-12)).astype("<f4")
    if is_base64:
        return orjson.Fragment(b'"' + base64.b64encode(unit_D.tobytes()) + b'"')
    return orjson.Fragment(orjson.dumps(unit_D, option=orjson.OPT_SERIALIZE_NUMPY))


def whole_answer(model: str, embeddings: Sequence[orjson.Fragment], num_tokens: int) -> bytes:
    data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(embeddings)]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return orjson.dumps({"object": "list", "data": data, "model": model, "usage": usage})
