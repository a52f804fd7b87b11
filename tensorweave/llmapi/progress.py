"""`Progress`: the part of a request's output that its consumer has seen. `RequestOutput` applies updates to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from tensorweave.llmapi.completion_output import CompletionOutput, OutputOptions, Update, as_dicts


@dataclass(slots=True)
class Progress:
    """`outputs` are the `sequences` that are returned: the best ones, once all have ended."""

    sequences: list[CompletionOutput]
    outputs: list[CompletionOutput]
    context_logits: list[bytes] = field(default_factory=list)
    num_cached_tokens: int = 0
    error: Exception | None = None

    @classmethod
    def begin(cls, num_sequences: int, num_returned: int | None, options: OutputOptions) -> Self:
        sequences = [CompletionOutput(index, _options=options) for index in range(num_sequences)]
        return cls(sequences, sequences[:num_returned])

    @property
    def is_finished(self) -> bool:
        return self.error is not None or all(output.finish_reason is not None for output in self.sequences)

    @property
    def values(self) -> tuple[object, ...]:
        """What two requests with the same content have in common."""
        error = None if self.error is None else (type(self.error), str(self.error))
        return (self.outputs, self.num_cached_tokens, b"".join(self.context_logits), error)

    def reset_diffs(self) -> None:
        """Make the diffs empty, unless nothing more can come."""
        if not self.is_finished:
            for sequence in self.sequences:
                sequence._reset_diffs()

    def apply(self, update: Update) -> None:
        if self.is_finished:
            return
        if update.error is not None:
            self.error = update.error
            return
        self.num_cached_tokens = max(self.num_cached_tokens, update.num_cached_tokens)
        if update.context_logits:
            self.context_logits.append(update.context_logits)
        if update.prompt_logprobs is not None:
            prompt_logprobs = as_dicts(update.prompt_logprobs)
            for sequence in self.sequences:
                sequence.prompt_logprobs = prompt_logprobs
        if self.sequences[update.index].finish_reason is not None:
            return
        self.sequences[update.index]._apply(update)
        if self.is_finished and len(self.outputs) < len(self.sequences):
            self.outputs = _best(self.sequences, len(self.outputs))


def _best(sequences: Sequence[CompletionOutput], num_returned: int) -> list[CompletionOutput]:
    """The best by cumulative log-probability. A sequence that was cancelled before its first token has none and is
    last."""
    ordered = sorted(
        sequences,
        key=lambda s: (s.cumulative_logprob is None, -(s.cumulative_logprob or 0.0)),
    )
    return [dataclasses.replace(sequence, index=index) for index, sequence in enumerate(ordered[:num_returned])]
