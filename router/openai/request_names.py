"""The ids of a request's sequences at the gangs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tensorweave.cluster.protocol import SamplingSpec


@dataclass(frozen=True, slots=True)
class RequestNames:
    """If the client gave the request an id, its sequences' ids are derived from it, the prompt and the sampling, so
    that only the same request finds its answer again. Several requests may have one id: each attempt adds a part of its
    own (`router/dispatch/attempt.py`)."""

    answer_id: str
    client_id: str | None

    def of(self, index: int, prompt: Sequence[int], spec: SamplingSpec, seed: int | None, salt: str | None) -> str:
        """The id of one sequence. `seed` is the client's: one that was drawn, which `spec` may hold, is not part of the
        id, because a repeated request draws another one."""
        if self.client_id is None:
            return f"{self.answer_id}-{index}"
        guide = None if spec.guide is None else spec.guide.digest  # its text is not part of its representation
        content = repr((self.client_id, list(prompt), dataclasses.replace(spec, seed=0), guide, seed, salt)).encode()
        digest = blake2b(content, digest_size=12).hexdigest()
        return f"{self.client_id.replace('/', '_')}-{digest}-{index}"
