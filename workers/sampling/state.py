"""`SamplingState`: what the sampling of one request remembers of its tokens and asks of its next row of logits.

It is made of `SamplingRule`s, one for each thing that the request asks for. All of it follows from the spec and the
tokens, so a replay, a pause or a change of gangs makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.sampling.logit_edits import LogitEdits


@dataclass(slots=True)
class TokenHistory:
    """Prompt and output of one request, as far as its sampling has followed them. Rules only read it.

    `position` is the place of the next token: the number of tokens, and of those that are drawn and not known yet.
    """

    tokens: list[int]
    prompt_len: int
    position: int

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len


class SamplingRule:
    """One condition on a request's tokens: a bias, a ban, a penalty, a grammar. As it stands it asks for nothing;
    override what applies.

    A rule is made when the history has the prompt alone. `advance` follows the output as it grows, several tokens at a
    time, and `roll_back` takes back tokens that were drafted and not accepted.

    `reads_tokens`: what it asks for follows from the tokens; else from the history's position alone. `only_penalises`:
    it asks for the spec's penalties alone, which a device can do by itself. `only_bans`: it forbids tokens, and changes
    no other logit.
    """

    reads_tokens: ClassVar[bool] = True
    only_bans: ClassVar[bool] = False
    only_penalises: ClassVar[bool] = False

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in new output, which is already at the end of the history."""

    def roll_back(self, num_tokens: int) -> None:
        """Undo the newest tokens, which are still at the end of the history."""

    def edit(self, row: int, edits: LogitEdits) -> None:
        """Ask for what the choice of the next token needs, in this row of the batch. The state does not change."""


MakeRules: TypeAlias = Callable[[SamplingSpec, TokenHistory], Iterable[SamplingRule]]


class SamplingState:
    """Args:
        counts_on_device: penalties are none of the state's `rules`, because a device applies them by its own counts.
        more_rules: beside those that `make_rules` makes.

    `edits_logits`: the token is not chosen by the model's logits alone. `only_bans`: all that its rules do is to forbid
    tokens. `reads_tokens`: the tokens before it must be known. `is_counted`: the device penalises it.
    """

    def __init__(
        self,
        spec: SamplingSpec,
        prompt: Sequence[int],
        make_rules: MakeRules,
        *,
        counts_on_device: bool = False,
        more_rules: Sequence[SamplingRule] = (),
    ) -> None:
        self.spec = spec
        self.history = TokenHistory(list(prompt), len(prompt), len(prompt))
        rules = (*make_rules(spec, self.history), *more_rules)
        self.rules = tuple(rule for rule in rules if not (counts_on_device and rule.only_penalises))
        self.is_counted = len(self.rules) < len(rules)
        self.has_processor = bool(spec.logits_processors or spec.uses_batched_processor)
        self.edits_logits = bool(rules or self.has_processor)
        self.only_bans = not self.has_processor and all(rule.only_bans for rule in rules)
        self.reads_tokens = self.has_processor or any(rule.reads_tokens for rule in self.rules)

    def follow(self, tokens: Sequence[int]) -> None:
        """Advance to the end of `tokens`, prompt and output, or roll back to it."""
        seen = len(self.history.tokens)
        if seen < len(tokens):
            self.advance(tokens[seen:])
        elif seen > len(tokens):
            self.roll_back(seen - len(tokens))

    def advance(self, tokens: Sequence[int]) -> None:
        self.history.tokens += tokens
        self.history.position = len(self.history.tokens)
        for rule in self.rules:
            rule.advance(tokens)

    def roll_back(self, num_tokens: int) -> None:
        assert num_tokens <= self.history.num_output, "a prompt is never rolled back"
        for rule in self.rules:
            rule.roll_back(num_tokens)
        del self.history.tokens[len(self.history.tokens) - num_tokens :]
        self.history.position = len(self.history.tokens)

    def edit(self, row: int, edits: LogitEdits) -> None:
        for rule in self.rules:
            rule.edit(row, edits)
