"""Tokens and their log-probabilities in answers: OpenAI's two forms, and vLLM's for prompts.

A token of an answer is written as its part of the answer's text; if that is not complete characters, as bytes:
`bytes:\\xe2\\x80` in completions and `\\xe2\\x80` in chats, as OpenAI does. A token without a part in the text, or a
likely one that was not chosen, is written as its text after other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tensorweave.cluster.protocol import Logprob, TokenLogprobs
from tensorweave.router.text.pieces import decode_utf8
from tensorweave.router.text.token_offsets import PlacedToken
from tensorweave.router.text.tokens import Tokenizer

_BYTES_MARK: Final = "bytes:"
_LEAST: Final = -9999.0  # JSON has no infinity; OpenAI writes this


class TokenShapes:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def completion_logprobs(self, tokens: Sequence[PlacedToken], num_top: int) -> dict[str, list[Any]]:
        """The likeliest tokens are keys of an object, so of two with the same text only the likelier is listed. The
        token itself is always among them."""
        return {
            "text_offset": [token.offset for token in tokens],
            "token_logprobs": [_number(token.logprobs[0]) if token.logprobs else None for token in tokens],
            "tokens": [self._own_text(token, _BYTES_MARK) for token in tokens],
            "top_logprobs": [self._by_text(token, num_top) if token.logprobs else None for token in tokens],
        }

    def _by_text(self, token: PlacedToken, num_top: int) -> dict[str, float]:
        own, *top = token.logprobs
        texts: dict[str, float] = {}
        for logprob in [*top[:num_top], own]:
            texts.setdefault(self._text_at(token, logprob.token_id, _BYTES_MARK), _number(logprob))
        return texts

    def chat_logprobs(self, tokens: Sequence[PlacedToken], num_top: int) -> dict[str, list[Any]]:
        content = [
            {
                **self._chat_token(token, own),
                "top_logprobs": [self._chat_token(token, logprob) for logprob in top[:num_top]],
            }
            for token in tokens
            for own, *top in [token.logprobs]
        ]
        return {"content": content}

    def _chat_token(self, place: PlacedToken, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": self._text_at(place, logprob.token_id, ""),
            "logprob": _number(logprob),
            "bytes": list(self._bytes_at(place, logprob.token_id)),
        }

    def prompt_logprobs(self, logprobs: Sequence[TokenLogprobs], num_top: int) -> list[dict[str, Any]]:
        """One entry per prompt token: the token itself and the `num_top` likeliest, by id."""
        return [{str(p.token_id): self._ranked(p) for p in token[: num_top + 1]} for token in logprobs]

    def _ranked(self, logprob: Logprob) -> dict[str, Any]:
        text = self.text(logprob.token_id, _BYTES_MARK)
        return {"logprob": _number(logprob), "rank": logprob.rank, "decoded_token": text}

    def text(self, token_id: int, bytes_mark: str) -> str:
        """The token's text after other text."""
        return _written(self._tokenizer.token_bytes(token_id), bytes_mark)

    def _text_at(self, place: PlacedToken, token_id: int, bytes_mark: str) -> str:
        """The text of a token at the position of `place`, chosen or not."""
        if token_id == place.token_id:
            return self._own_text(place, bytes_mark)
        return _written(self._tokenizer.token_bytes(token_id, begins_text=place.begins_text), bytes_mark)

    def _own_text(self, token: PlacedToken, bytes_mark: str) -> str:
        match token.own:
            case str():
                return token.own
            case bytes():
                return _escaped(token.own, bytes_mark)
            case None:
                return self.text(token.token_id, bytes_mark)

    def _bytes_at(self, place: PlacedToken, token_id: int) -> bytes:
        if token_id != place.token_id or place.own is None:
            return self._tokenizer.token_bytes(token_id, begins_text=place.begins_text)
        return place.own.encode() if isinstance(place.own, str) else place.own


def _written(raw: bytes, bytes_mark: str) -> str:
    text = decode_utf8(raw)
    return _escaped(raw, bytes_mark) if text is None else text


def _escaped(raw: bytes, bytes_mark: str) -> str:
    return bytes_mark + "".join([chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in raw]) if raw else ""


def _number(logprob: Logprob) -> float:
    return max(_LEAST, logprob.logprob)
