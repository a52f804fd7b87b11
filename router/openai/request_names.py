"""How a request's sequences are called at the gangs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tensorweave.cluster.protocol import SamplingSpec


@dataclass(frozen=True, slots=True)
class RequestNames:
    """Where the client has named the request, its sequences' names follow from that, prompt and sampling: only the same
    request finds its answer again. Many requests may have one name: each attempt adds its own (`router.attempt`)."""

    answer_id: str
    client_id: str | None

    def of(self, index: int, prompt: Sequence[int], spec: SamplingSpec, seed: int | None, salt: str | None) -> str:
        """`seed`: the client's. One that was drawn, as `spec` may hold it, is not part of the name: whoever asks again
        draws another one."""
        if self.client_id is None:
            return f"{self.answer_id}-{index}"
        content = repr((self.client_id, list(prompt), dataclasses.replace(spec, seed=0), seed, salt)).encode()
        digest = blake2b(content, digest_size=12).hexdigest()
        return f"{self.client_id.replace('/', '_')}-{digest}-{index}"
