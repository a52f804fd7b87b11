"""The OpenAI request body of /v1/embeddings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from tensorweave.router.openai.field_types import AtLeast1, Positive, Priority, Prompt, read_prompts
from tensorweave.router.openai.parsing import ParsedRequest

MAX_INPUTS = 2048
"""OpenAI's limit."""


class EmbeddingRequest(ParsedRequest):
    """POST /v1/embeddings."""

    model: str
    input: Prompt = Field(
        description="A string, a list of strings, a list of token ids, or a list of lists of token ids."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="'base64': packed little-endian float32. Default 'float'."
    )
    dimensions: AtLeast1 | None = Field(None, description="Keep the first so many numbers, and normalize these.")
    user: Any = Field(None, description="Accepted; changes nothing.")
    add_special_tokens: bool | None = Field(None, description="Extension. Default true.")
    truncate_prompt_tokens: AtLeast1 | None = Field(None, description="Extension. Keep the last so many tokens.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="Extension. Share cached prompts only under one salt."
    )
    priority: Priority | None = Field(None, description="Extension. Higher goes first.")
    timeout_s: Positive | None = Field(None, description="Extension. The request's deadline.")

    @field_validator("input")
    @classmethod
    def _check_input(cls, value: Any) -> list[str | list[int]]:
        inputs = read_prompts(value)
        if len(inputs) > MAX_INPUTS:
            raise ValueError(f"has {len(inputs)} inputs; the limit is {MAX_INPUTS}")
        return inputs
