"""`IncrementalDetokenizer`: token ids in, finished text out, with stop strings.

Used by the router and the LLM API, one per sequence. It never returns part of a character, nor text that may be the
start of a stop string. The parts that it returns, joined, are the sequence's text.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensorweave.router.text.tokens import Tokenizer


class StopStrings:
    """Finds the first complete stop string in a stream of text, also across the borders of its parts."""

    def __init__(self, stops: Sequence[str], *, is_included: bool) -> None:
        assert all(stops), "an empty stop string"
        self._stops = tuple(dict.fromkeys(stops))
        self._is_included = is_included
        self._held = ""
        self.found: str | None = None

    @property
    def are_any(self) -> bool:
        return bool(self._stops)

    def push(self, text: str) -> str:
        """Add text and return what cannot belong to a stop string. After a hit, `found` is set and the text ends."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        text = self._held + text
        self._held = ""
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if hits:
            end, start, self.found = min(hits)
            return text[: end if self._is_included else start]
        held = self._num_held(text)
        if held:
            self._held = text[-held:]
            return text[:-held]
        return text

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """The length of the longest suffix of `text` that is the start of a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest


class IncrementalDetokenizer:
    """Text of one sequence, part by part.

    Args:
        tokenizer: The model's tokenizer.
        context: The prompt's `Tokenizer.left_context`, after which the text continues.
        skip_special_tokens: Special tokens have no text.
        shown: These special tokens have their text all the same.
        spaces_between_special_tokens: For tokenizers without a Rust backend; others ignore it.
        stop: Stop strings. The first that is complete ends the text and becomes `stop_reason`.
        include_stop_str_in_output: Keep the stop string, or the text of a stop token, at the end.
        min_tokens: Stop strings are ignored in the text of the first `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._text = tokenizer.assembler(
            context,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            shown=shown,
        )
        self._stops = StopStrings(stop, is_included=include_stop_str_in_output)
        self._keeps_stop = include_stop_str_in_output
        self._free_tokens = min_tokens if stop else 0

    @property
    def has_stop_strings(self) -> bool:
        return self._stops.are_any

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended the text; None if none did."""
        return self._stops.found

    def push(self, token_ids: Sequence[int], *, ends_with_stop_token: bool = False) -> str:
        """The text that these ids complete. `ends_with_stop_token`: the last id ended the sequence and has no text."""
        if ends_with_stop_token and not self._keeps_stop:
            token_ids = token_ids[:-1]
        if not self._free_tokens:
            return self._stops.push(self._text.add(token_ids))
        free, watched = token_ids[: self._free_tokens], token_ids[self._free_tokens :]
        self._free_tokens -= len(free)
        return self._text.add(free) + (self._stops.push(self._text.add(watched)) if watched else "")

    def flush(self) -> str:
        """The rest at the end: held text, with incomplete characters as U+FFFD. It may still find a stop string."""
        text = self._stops.push(self._text.finish())
        return text + self._stops.flush()
