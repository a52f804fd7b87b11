"""What `speculative_config` may be: which drafter guesses the tokens that a step verifies, and when it rests.

The fields and their names are those of TensorRT-LLM. docs/speculative_decoding.md says how the drafts are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import model_validator

from tensorweave.cluster.llm_args_refused import SPECULATION, Refusal
from tensorweave.cluster.strict_model import Field, StrictBaseModel

MOST_DRAFTED: Final = 128
DECODING_TYPES: Final = ("NGram", "User_Provided")


class DecodingBaseConfig(StrictBaseModel):
    """What all kinds of speculation have in common."""

    refused: ClassVar[Mapping[str, Refusal]] = SPECULATION

    max_draft_len: int = Field(
        status="prototype",
        ge=1,
        le=MOST_DRAFTED,
        description="Most tokens that are drafted for one request and verified in one step.",
    )
    max_total_draft_tokens: int | None = Field(
        None, status="prototype", description="None or max_draft_len: drafts are sequences, not trees."
    )
    max_concurrency: int | None = Field(
        None,
        status="prototype",
        ge=1,
        description="In steps of more requests than this nothing is drafted. Default: no such limit.",
    )
    acceptance_window: int | None = Field(
        None,
        status="prototype",
        ge=0,
        description="Requests over whose ends acceptance_length_threshold takes the mean. None or 0: no threshold.",
    )
    acceptance_length_threshold: float | None = Field(
        None,
        status="prototype",
        ge=0,
        description="Where the last acceptance_window requests had fewer accepted draft tokens per step than this on "
        "average, nothing is drafted any more. Default: no threshold.",
    )

    @model_validator(mode="after")
    def _check_drafts(self) -> Self:
        if self.max_total_draft_tokens not in (None, self.max_draft_len):
            raise ValueError(
                f"max_total_draft_tokens is {self.max_total_draft_tokens}, must be max_draft_len ({self.max_draft_len})"
                " or left out: drafts are sequences, not trees"
            )
        if (self.acceptance_length_threshold is None) == bool(self.acceptance_window):
            raise ValueError("acceptance_window and acceptance_length_threshold belong together: set both or none")
        self.model_fields_set.add("decoding_type")  # dumps of what was set keep it: it says which class reads them
        return self


class NGramDecodingConfig(DecodingBaseConfig):
    """Drafts what followed the newest tokens where they stood before: in the request's own prompt and output."""

    decoding_type: Literal["NGram"] = Field("NGram", status="prototype", description="Names this class in YAML.")
    max_matching_ngram_size: int = Field(
        2,
        status="prototype",
        ge=1,
        le=16,
        description="Most tokens that are compared. The longest n-gram that stood before is taken.",
    )
    is_keep_all: bool = Field(
        True,
        status="prototype",
        description="True: all places of an n-gram are known, so that is_use_oldest has a choice. False: the first one "
        "alone.",
    )
    is_use_oldest: bool = Field(
        True, status="prototype", description="Continue from an n-gram's first place; False: from its newest one."
    )
    is_public_pool: bool = Field(
        False,
        status="prototype",
        description="Also draft what followed in other requests. Off, unlike in TensorRT-LLM: how fast an answer comes "
        "would tell a user what others have written.",
    )


class UserProvidedDecodingConfig(DecodingBaseConfig):
    """Drafts what a drafter of the user's makes."""

    decoding_type: Literal["User_Provided"] = Field(
        "User_Provided", status="prototype", description="Names this class in YAML."
    )
    drafter: Any = Field(
        status="prototype",
        description="An object with prepare_draft_tokens(scheduled), or 'package.module:Class' of one, which is made "
        "of this configuration.",
    )
    resource_manager: Any = Field(
        None,
        status="prototype",
        description="A BaseResourceManager that is told of every request's steps and end. Default: none.",
    )

    @model_validator(mode="after")
    def _check_drafter(self) -> Self:
        if isinstance(self.drafter, str):
            if ":" not in self.drafter:
                raise ValueError(f"drafter is {self.drafter!r}, must look like 'package.module:Class'")
        elif not callable(getattr(self.drafter, "prepare_draft_tokens", None)):
            raise ValueError(f"drafter is a {type(self.drafter).__name__} without prepare_draft_tokens(scheduled)")
        return self


SpeculativeConfig = NGramDecodingConfig | UserProvidedDecodingConfig


def check_decoding_type(value: Any) -> Any:
    """Refuse tables that name no kind of speculation of ours. Raises ValueError."""
    if not isinstance(value, dict):
        return value
    kinds = " or ".join(repr(kind) for kind in DECODING_TYPES)
    kind = value.get("decoding_type")
    if kind is None:
        raise ValueError(f"decoding_type is missing: it must be {kinds}")
    if kind not in DECODING_TYPES:
        raise ValueError(f"decoding_type {kind!r} is not supported yet; it must be {kinds}, which need no draft model")
    return value
