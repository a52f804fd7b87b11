"""How tokens and their log-probabilities are written in answers: OpenAI's two shapes, and vLLM's for prompts.

A token is written as its text; one whose bytes are no whole character, as bytes: `bytes:\\xe2\\x80` in completions and
`\\xe2\\x80` in chats, as OpenAI does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tensorweave.cluster.protocol import Logprob, TokenLogprobs
from tensorweave.router.choices import ToldToken
from tensorweave.router.tokens import Tokenizer

_LEAST: Final = -9999.0  # JSON has no infinity; OpenAI writes this


class TokenShapes:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def completion_logprobs(self, tokens: Sequence[ToldToken], num_top: int) -> dict[str, list[Any]]:
        """The likeliest tokens are keys, so of two that read the same the likelier is told. The token itself is always
        among them."""
        return {
            "text_offset": [token.offset for token in tokens],
            "token_logprobs": [_number(token.logprobs[0]) if token.logprobs else None for token in tokens],
            "tokens": [self.text(token.token_id, "bytes:") for token in tokens],
            "top_logprobs": [self._by_text(token.logprobs, num_top) if token.logprobs else None for token in tokens],
        }

    def _by_text(self, logprobs: TokenLogprobs, num_top: int) -> dict[str, float]:
        own, *top = logprobs
        told: dict[str, float] = {}
        for logprob in [*top[:num_top], own]:
            told.setdefault(self.text(logprob.token_id, "bytes:"), _number(logprob))
        return told

    def chat_logprobs(self, tokens: Sequence[ToldToken], num_top: int) -> dict[str, list[Any]]:
        content = [
            {**self._chat_token(own), "top_logprobs": [self._chat_token(logprob) for logprob in top[:num_top]]}
            for own, *top in [token.logprobs for token in tokens]
        ]
        return {"content": content}

    def _chat_token(self, logprob: Logprob) -> dict[str, Any]:
        token_id = logprob.token_id
        return {
            "token": self.text(token_id, ""),
            "logprob": _number(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def prompt_logprobs(self, logprobs: Sequence[TokenLogprobs], num_top: int) -> list[dict[str, Any]]:
        """One entry a prompt token: itself and so many likeliest, by id."""
        return [{str(p.token_id): self._ranked(p) for p in token[: num_top + 1]} for token in logprobs]

    def _ranked(self, logprob: Logprob) -> dict[str, Any]:
        text = self.text(logprob.token_id, "bytes:")
        return {"logprob": _number(logprob), "rank": logprob.rank, "decoded_token": text}

    def text(self, token_id: int, bytes_mark: str) -> str:
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return bytes_mark + "".join([chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in raw])


def _number(logprob: Logprob) -> float:
    return max(_LEAST, logprob.logprob)
