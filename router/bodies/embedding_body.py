"""From the bytes of a body of /v1/embeddings to its inputs as token ids."""

from __future__ import annotations

import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cluster.context_length import input_exceeds_context
from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.bodies.served import ServedModel, check_name, check_text
from tensorweave.router.openai.embedding_request import EmbeddingRequest
from tensorweave.router.openai.parsing import parse_request
from tensorweave.router.sampling.resolution import check_prompt
from tensorweave.router.text.tokens import Tokenizer

_TOKENS: Final = "i"


@dataclass(frozen=True, slots=True)
class EmbeddingBody:
    """A checked body. `dimensions`: how many numbers of each embedding are wanted; None: all."""

    inputs: Sequence[Sequence[int]]
    is_base64: bool
    dimensions: int | None
    cache_salt: str | None
    priority: int
    timeout_s: float | None

    def pack(self) -> list[Any]:
        """As msgpack fields."""
        inputs = [array.array(_TOKENS, token_ids).tobytes() for token_ids in self.inputs]
        return [inputs, self.is_base64, self.dimensions, self.cache_salt, self.priority, self.timeout_s]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> EmbeddingBody:
        inputs, *rest = packed
        return cls([array.array(_TOKENS, token_ids).tolist() for token_ids in inputs], *rest)


def read_embedding(body: bytes, tokenizer: Tokenizer, served: ServedModel) -> EmbeddingBody:
    """Raises RequestRejected."""
    request = parse_request(EmbeddingRequest, body)
    check_name(served.model_names, request.model)
    size = served.info.embedding_size
    if request.dimensions is not None and request.dimensions > size:
        raise RequestRejected(
            f"dimensions is {request.dimensions}; embeddings of this model have {size}", param="dimensions"
        )
    return EmbeddingBody(
        [_token_ids(each, request, tokenizer, served) for each in request.input],
        request.encoding_format == "base64",
        request.dimensions,
        request.cache_salt,
        request.priority or 0,
        request.timeout_s,
    )


def _token_ids(
    given: str | list[int], request: EmbeddingRequest, tokenizer: Tokenizer, served: ServedModel
) -> list[int]:
    token_ids = given
    if isinstance(token_ids, str):
        if request.truncate_prompt_tokens is None:
            check_text(token_ids, tokenizer, served, param="input")
        token_ids = tokenizer.encode(token_ids, add_special_tokens=request.add_special_tokens is not False)
    if request.truncate_prompt_tokens is not None:
        token_ids = token_ids[-request.truncate_prompt_tokens :]
    check_prompt(token_ids, served.info, param="input")
    if len(token_ids) >= served.info.max_seq_len:
        raise input_exceeds_context(served.info.max_seq_len - 1, len(token_ids))
    return token_ids
