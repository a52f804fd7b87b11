"""What is done with the body of a POST, by name. It is the same in the event loop and in a worker process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from tensorweave.router.bodies.embedding_body import EmbeddingBody, read_embedding
from tensorweave.router.bodies.request_body import RequestBody, read_chat, read_completion
from tensorweave.router.bodies.served import ServedModel
from tensorweave.router.bodies.tokenize import detokenize, tokenize
from tensorweave.router.bodies.translated import count_tokens, read_messages, read_response
from tensorweave.router.text.tokens import Tokenizer

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class BodyTask(Generic[ResultT]):
    """`run` raises RequestRejected. `pack` turns its result into msgpack fields, and `unpack` turns them back."""

    name: str
    run: Callable[[bytes, Tokenizer, ServedModel], ResultT]
    pack: Callable[[ResultT], Sequence[Any]]
    unpack: Callable[[Sequence[Any]], ResultT]


def _answering(name: str, run: Callable[[bytes, Tokenizer, ServedModel], bytes]) -> BodyTask[bytes]:
    return BodyTask(name, run, lambda answer: [answer], lambda packed: bytes(packed[0]))


COMPLETION: Final = BodyTask("completion", read_completion, RequestBody.pack, RequestBody.unpack)
CHAT: Final = BodyTask("chat", read_chat, RequestBody.pack, RequestBody.unpack)
TOKENIZE: Final = _answering("tokenize", tokenize)
DETOKENIZE: Final = _answering("detokenize", detokenize)
MESSAGES: Final = BodyTask("messages", read_messages, RequestBody.pack, RequestBody.unpack)
COUNT_TOKENS: Final = _answering("count_tokens", count_tokens)
RESPONSES: Final = BodyTask("responses", read_response, RequestBody.pack, RequestBody.unpack)
EMBEDDING: Final = BodyTask("embedding", read_embedding, EmbeddingBody.pack, EmbeddingBody.unpack)

BY_NAME: Final[dict[str, BodyTask[Any]]] = {
    task.name: task for task in (COMPLETION, CHAT, TOKENIZE, DETOKENIZE, MESSAGES, COUNT_TOKENS, RESPONSES, EMBEDDING)
}
