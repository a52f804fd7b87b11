"""`Tokenizer`: text and chats to token ids and back, around any transformers tokenizer.

Used by the HTTP router and by the LLM API. It calls the underlying Rust tokenizer directly (a short chat is rendered
and encoded in about 50 µs). It can be pickled, for the worker processes that parse large request bodies.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import tokenizers

from tensorweave.router.text.assembly import TextAssembler, assemble
from tensorweave.router.text.chat_template import ChatPrompt, WrittenOfTools, render, written_of_tools
from tensorweave.router.text.pieces import Pieces, WindowedPieces, read_pieces
from tensorweave.router.text.text_bound import max_chars_per_token

_LONG_TEXT_CHARS: Final = 4096
"""From about 1 ms of encoding on, the interpreter's lock is released meanwhile; below, that costs more than it
gains."""
_COSTLY: Final = ("max_chars_per_token", "written_of_tools")
"""The former takes 0.1 to 0.4 s for 49,152 tokens."""


class Tokenizer:
    """A transformers tokenizer with the methods that serving needs. Safe to use from several threads.

    `uses_rust`: call the underlying Rust tokenizer directly, if there is one.
    """

    def __init__(self, backend: Any, *, uses_rust: bool = True) -> None:
        self.backend = backend
        self._uses_rust = uses_rust
        rust = getattr(backend, "backend_tokenizer", None) if uses_rust else None
        self._rust = self._private_copy(rust) if isinstance(rust, tokenizers.Tokenizer) else None
        self.special_ids = self._find_special_ids()
        self._pieces = read_pieces(self._rust) if self._rust is not None else None
        self._template_arguments = frozenset(inspect.signature(backend.apply_chat_template).parameters)

    def __reduce__(self) -> tuple[Any, ...]:
        """With what took long to find out, so that processes which get a copy do not repeat it."""
        known = {name: self.__dict__[name] for name in _COSTLY if name in self.__dict__}
        return functools.partial(Tokenizer, uses_rust=self._uses_rust), (self.backend,), known

    @staticmethod
    def _private_copy(rust: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
        """A copy, because transformers changes truncation and padding of its own object in each call, in any thread."""
        private: tokenizers.Tokenizer = copy.deepcopy(rust)
        private.no_truncation()
        private.no_padding()
        return private

    @classmethod
    def load(
        cls,
        source: str | Path | Any,
        *,
        tokenizer_mode: Literal["auto", "slow"] = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Tokenizer:
        """From a directory, a hub id, a transformers tokenizer, or a `Tokenizer`, which is returned unchanged. Mode
        'slow' uses transformers' own methods only. Raises ValueError, OSError."""
        if isinstance(source, Tokenizer):
            return source
        from huggingface_hub.errors import StrictDataclassError  # here: it imports torch, which workers do not need
        from transformers import AutoTokenizer

        uses_rust = tokenizer_mode != "slow"
        if not isinstance(source, str | Path):
            if not callable(getattr(source, "apply_chat_template", None)):
                raise ValueError(f"a {type(source).__name__} is no tokenizer of transformers")
            return cls(source, uses_rust=uses_rust)
        try:
            backend = AutoTokenizer.from_pretrained(
                str(source), use_fast=uses_rust, revision=revision or "main", trust_remote_code=trust_remote_code
            )
        except (KeyError, TypeError, StrictDataclassError) as error:  # it also reads config.json, without checking it
            raise ValueError(f"no tokenizer can be loaded from {source}: {' '.join(str(error).split())}") from error
        return cls(backend, uses_rust=uses_rust)

    def _find_special_ids(self) -> frozenset[int]:
        if self._rust is None:
            added = self.backend.added_tokens_decoder
            special = {token_id for token_id, token in added.items() if token.special}
            return frozenset([*self.backend.all_special_ids, *special])
        return frozenset(token_id for token_id, token in self._rust.get_added_tokens_decoder().items() if token.special)

    @property
    def is_rust(self) -> bool:
        """Whether the Rust tokenizer is used, which is about ten times as fast as Python."""
        return self._rust is not None

    @property
    def eos_id(self) -> int | None:
        token_id: int | None = self.backend.eos_token_id
        return token_id

    @property
    def pad_id(self) -> int | None:
        token_id: int | None = self.backend.pad_token_id
        return token_id

    @property
    def vocab_size(self) -> int:
        """Number of the tokenizer's ids, added tokens included. The model's vocabulary may be padded beyond it."""
        return len(self.backend)

    @property
    def chat_template(self) -> str | Mapping[str, str] | None:
        """One, or several by name."""
        template: str | Mapping[str, str] | None = self.backend.chat_template
        return template

    @functools.cached_property
    def written_of_tools(self) -> WrittenOfTools:
        """What the chat template writes of a conversation with tools."""
        return written_of_tools(self.backend)

    @property
    def leaves_tools_out(self) -> bool:
        """Whether there is a chat template, which knows no tools."""
        return bool(self.chat_template) and not any(self.written_of_tools)

    def encode(self, text: str, *, add_special_tokens: bool = True, truncate: int | None = None) -> list[int]:
        """Token ids of `text`, only the last `truncate` if that is given."""
        ids: list[int]
        if self._rust is not None:
            ids = self._encode(text, add_special_tokens=add_special_tokens)
        else:
            ids = list(self.backend.encode(text, add_special_tokens=add_special_tokens))
        return ids if truncate is None else ids[-truncate:]

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """A long text goes as a batch: only then does the Rust tokenizer release the interpreter's lock."""
        assert self._rust is not None
        if len(text) <= _LONG_TEXT_CHARS:
            ids: list[int] = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        else:
            ids = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    @functools.cached_property
    def max_chars_per_token(self) -> int | None:
        """See `text_bound.max_chars_per_token`."""
        return None if self._rust is None else max_chars_per_token(self._rust)

    def render_chat(self, prompt: ChatPrompt) -> str:
        """The chat template's text. Raises RequestRejected if the template refuses."""
        return render(self.backend, prompt, self._template_arguments)

    def chat(self, prompt: ChatPrompt, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a conversation. The template writes the special tokens itself."""
        return self.encode(self.render_chat(prompt), add_special_tokens=add_special_tokens)

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of all ids together; unknown ids have no text."""
        text: str
        if self._rust is not None:
            text = self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        else:
            text = self.backend.decode(
                [token_id for token_id in token_ids if self.knows(token_id)],
                skip_special_tokens=skip_special_tokens,
                spaces_between_special_tokens=spaces_between_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        return text

    def token_bytes(self, token_id: int, *, begins_text: bool = False) -> bytes:
        """What one token adds to a text, special tokens included; it may end within a character. Empty for unknown ids.
        `begins_text`: there is no text before it, where some tokenizers drop its leading space."""
        table = self.pieces(spaces_between_special_tokens=True)
        return table.token_bytes(token_id, begins_text=begins_text or token_id in self.special_ids)

    def knows(self, token_id: int) -> bool:
        """Whether the tokenizer has this id. A model's vocabulary may be larger."""
        if self._rust is not None:
            return self._rust.id_to_token(token_id) is not None
        return token_id in self._all_ids

    @functools.cached_property
    def _all_ids(self) -> frozenset[int]:
        return frozenset(self.backend.get_vocab().values())

    @functools.cached_property
    def num_added_tokens(self) -> tuple[int, int]:
        """How many special tokens `encode` adds before and after a text."""
        bare, full = self.encode("a", add_special_tokens=False), self.encode("a")
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return start, len(full) - start - len(bare)
        return 0, 0

    def token_names(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's entry for each token."""
        names: list[str | None] = self.backend.convert_ids_to_tokens(list(token_ids))
        return [name or "" for name in names]

    def word_ids(self, word: str) -> list[list[int]]:
        """The token sequences that encode a word: within a text, and after a space."""
        spellings = [self._ids_within(prefix + word) for prefix in ("", " ")]
        return [ids for place, ids in enumerate(spellings) if ids and ids not in spellings[:place]]

    def _ids_within(self, text: str) -> list[int]:
        """Encode `text` after a line break if the result can be separated: some tokenizers add a space before a
        text."""
        before = self.encode("\n", add_special_tokens=False)
        ids = self.encode("\n" + text, add_special_tokens=False)
        if before and len(ids) > len(before) and ids[: len(before)] == before:
            return ids[len(before) :]
        return self.encode(text, add_special_tokens=False)

    def assembler(
        self,
        context: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> TextAssembler:
        """Text from ids, a few at a time, after `context`, which is a prompt's `left_context`. Ids in `shown` are not
        skipped."""
        skipped = self.skipped_ids(skip_special_tokens=skip_special_tokens, shown=shown)
        return assemble(self.pieces(spaces_between_special_tokens=spaces_between_special_tokens), skipped, context)

    def left_context(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True, shown: frozenset[int] = frozenset()
    ) -> Sequence[int]:
        """The last ids of a prompt, enough that an answer has the same text after them as after all of it."""
        skipped = self.skipped_ids(skip_special_tokens=skip_special_tokens, shown=shown)
        return self.pieces(spaces_between_special_tokens=True).left_context(prompt, skipped)

    def skipped_ids(self, *, skip_special_tokens: bool, shown: frozenset[int] = frozenset()) -> frozenset[int]:
        """The tokens that have no text in an answer."""
        return self.special_ids - shown if skip_special_tokens else frozenset()

    def special_ids_in(self, texts: Iterable[str]) -> frozenset[int]:
        """The special tokens that these texts have."""
        ids = [token_id for text in texts for token_id in self.encode(text, add_special_tokens=False)]
        return self.special_ids.intersection(ids)

    def pieces(self, *, spaces_between_special_tokens: bool) -> Pieces:
        """What an assembler uses: a table of the tokens, or a window over `decode`."""
        if self._pieces is not None:
            return self._pieces
        return self._windows[spaces_between_special_tokens]

    @functools.cached_property
    def _windows(self) -> dict[bool, WindowedPieces]:
        some_text = self.encode("a", add_special_tokens=False)
        return {
            spaces: WindowedPieces(
                functools.partial(self.decode, skip_special_tokens=False, spaces_between_special_tokens=spaces),
                self.knows,
                lambda token_id: self.token_names([token_id])[0],
                some_text,
            )
            for spaces in (False, True)
        }
