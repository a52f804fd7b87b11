"""The parts of xgrammar's structural tags that guides are made of, as JSON. Workers compile them (`workers/guided/`).

Written here because xgrammar's own builders import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorweave.cluster.guide import DEFAULT_MAX_WHITESPACE

TagFormat = dict[str, Any]
"""A format of xgrammar's `structural_tag` module, in its JSON form."""


def tag(begin: str, content: TagFormat, end: str) -> TagFormat:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def sequence(*elements: TagFormat) -> TagFormat:
    return elements[0] if len(elements) == 1 else {"type": "sequence", "elements": list(elements)}


def one_of(*elements: TagFormat) -> TagFormat:
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": list(elements)}


def optional(content: TagFormat) -> TagFormat:
    return {"type": "optional", "content": content}


def any_text(max_tokens: int | None = None, excludes: Sequence[str] = ()) -> TagFormat:
    """`excludes`: texts that do not occur in it."""
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    return {"type": "any_text", **limit, **({"excludes": list(excludes)} if excludes else {})}


def matching(pattern: str) -> TagFormat:
    return {"type": "regex", "pattern": pattern}


def json_text(
    schema: Mapping[str, Any], *, style: str = "json", max_whitespace: int = DEFAULT_MAX_WHITESPACE
) -> TagFormat:
    """JSON, or its counterpart in a family's `style`, that follows the schema. White space has to be possible here:
    a maximum of 0 is read as 1."""
    style_part = {} if style == "json" else {"style": style}
    return {
        "type": "json_schema",
        "json_schema": dict(schema),
        "max_whitespace_cnt": max(1, max_whitespace),
        **style_part,
    }


@dataclass(frozen=True, slots=True)
class CallTags:
    """One tag for each tool that may be called, and what stands around and between the calls of an answer."""

    tags: Sequence[TagFormat]
    begin: str = ""
    end: str = ""
    separator: str = "\n"

    def required(self, *, is_parallel: bool) -> TagFormat:
        """At least one call and nothing else."""
        calls = {
            "type": "tags_with_separator",
            "tags": list(self.tags),
            "separator": self.separator,
            "at_least_one": True,
            "stop_after_first": not is_parallel,
        }
        return tag(self.begin, calls, self.end) if self.begin else calls

    def possible(self, trigger: str, *, is_parallel: bool, excludes: Sequence[str] = ()) -> TagFormat:
        """Free text without `excludes`, in which `trigger` begins a call."""
        return {
            "type": "triggered_tags",
            "triggers": [trigger],
            "tags": [self.required(is_parallel=is_parallel)] if self.begin else list(self.tags),
            "stop_after_first": not is_parallel,
            "excludes": list(excludes),
        }
