"""`IncrementalDetokenizer`: token ids in, finished text out, with stop strings.

Used by the router and the LLM API, one per sequence. It never releases part of a character, nor text that may turn out
to be the start of a stop string; the pieces that it returns, joined, are the sequence's text.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensorweave.router.text.tokens import Tokenizer


class StopStrings:
    """Watches a stream of text for the stop string that is complete first, whatever the borders of the pieces."""

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
        """The text that is safe to release. After a hit, `found` is set and nothing more comes."""
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
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest


class IncrementalDetokenizer:
    """Text of one sequence, piece by piece.

    Args:
        tokenizer: Whose tokens they are.
        context: The prompt's `Tokenizer.left_context`: the text goes on from it, with its space or its character.
        skip_special_tokens: Special tokens leave no text.
        spaces_between_special_tokens: Passed to tokenizers without a Rust backend, which alone know it.
        stop: Stop strings; the first to be complete ends the text, and `stop_reason` names it.
        include_stop_str_in_output: Keep the stop string, or the text of a stop token, at the end.
        min_tokens: Stop strings count only in the text of tokens after the first so many.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._text = tokenizer.assembler(
            context,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )
        self._stops = StopStrings(stop, is_included=include_stop_str_in_output)
        self._keeps_stop = include_stop_str_in_output
        self._free_tokens = min_tokens if stop else 0

    @property
    def has_stop_strings(self) -> bool:
        return self._stops.are_any

    @property
    def stop_reason(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stops.found

    def push(self, token_ids: Sequence[int], *, ends_with_stop_token: bool = False) -> str:
        """New text that these ids complete. With `ends_with_stop_token`, the last id stopped the sequence: left out."""
        if ends_with_stop_token and not self._keeps_stop:
            token_ids = token_ids[:-1]
        if not self._free_tokens:
            return self._stops.push(self._text.add(token_ids))
        free, watched = token_ids[: self._free_tokens], token_ids[self._free_tokens :]
        self._free_tokens -= len(free)
        return self._text.add(free) + (self._stops.push(self._text.add(watched)) if watched else "")

    def flush(self) -> str:
        """At the end: incomplete characters as U+FFFD, and what was held back. May still find a stop string."""
        text = self._stops.push(self._text.finish())
        return text + self._stops.flush()
