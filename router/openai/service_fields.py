"""OpenAI's request fields about its own service (tiers, storage, billing, caching).

They are checked and have no effect on an answer. Names of tiers and the like are not checked, because they change
often.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import Field

from tensorweave.router.openai.parsing import ParsedRequest

NO_CHANGE: Final = "Accepted; it has no effect on the answer."

ServiceName = Annotated[str, Field(min_length=1, max_length=64)]


class ServiceFields(ParsedRequest):
    """Fields that completions and chats share."""

    metadata: dict[str, Any] | None = Field(None, description=NO_CHANGE)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=NO_CHANGE)
    prompt_cache_retention: ServiceName | None = Field(None, description=NO_CHANGE)
    safety_identifier: str | None = Field(None, description=NO_CHANGE)
    service_tier: ServiceName | None = Field(None, description=NO_CHANGE)
    store: bool | None = Field(None, description=NO_CHANGE)
