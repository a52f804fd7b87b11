"""The OpenAI request body of /v1/completions."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.openai.field_types import NumLogprobs, NumSequences, Prompt, read_prompts
from tensorweave.router.openai.generate_body import GenerateBody
from tensorweave.router.openai.not_built import IN_COMPLETIONS, NotBuilt
from tensorweave.router.text.choices import Telling


class CompletionRequest(GenerateBody):
    """POST /v1/completions."""

    OFF: ClassVar[NotBuilt] = IN_COMPLETIONS
    DEFAULT_MAX_TOKENS: ClassVar[int | None] = 16

    prompt: Prompt = Field(
        description="A string, a list of strings, a list of token ids, or a list of lists of token ids."
    )
    best_of: NumSequences | None = Field(
        None, description="Generate so many and return the n of highest mean log-probability. Not streamed."
    )
    echo: bool | None = Field(None, description="Begin the text, and the log-probabilities, with the prompt.")
    logprobs: NumLogprobs | None = Field(
        None, description="Log-probabilities of each token, and of so many of the likeliest."
    )

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        prompts = read_prompts(prompt)
        return prompts if isinstance(prompt, list) and isinstance(prompt[0], str | list) else prompts[0]

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise RequestRejected(f"best_of is {self.best_of}, less than n", param="best_of")
        if self.stream and self.num_sequences > (self.n or 1):
            raise RequestRejected("the best of several sequences cannot be streamed", param="best_of")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return (
            list(self.prompt)
            if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
            else [self.prompt]
        )

    @property
    def prompt_param(self) -> str:
        return "prompt"

    def without_bulk(self) -> Self:
        return super().without_bulk().model_copy(update={"prompt": [0] if isinstance(self.prompt, list) else "-"})

    @property
    def given_token_ids(self) -> tuple[str, bool]:
        return self.prompt_param, isinstance(self.prompt, list)

    @property
    def num_sequences(self) -> int:
        return self.best_of or self.n or 1

    @property
    def telling(self) -> Telling:
        return Telling(
            num_logprobs=self.logprobs,
            num_prompt_logprobs=self.prompt_logprobs,
            has_token_ids=bool(self.return_token_ids),
            has_echo=bool(self.echo),
            has_output=not (self.echo and self.max_tokens == 0),
            is_ranked=self.num_sequences > (self.n or 1),
        )
