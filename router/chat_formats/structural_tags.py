"""The parts of xgrammar's structural tags that guides are made of, as JSON. Workers compile them (`workers/guided/`).

Written here because xgrammar's own builders import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def any_number_of(content: TagFormat) -> TagFormat:
    return {"type": "star", "content": content}


def any_text(max_tokens: int | None = None, excludes: Sequence[str] = ()) -> TagFormat:
    """`excludes`: texts that do not occur in it."""
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    return {"type": "any_text", **limit, **({"excludes": list(excludes)} if excludes else {})}


def constant(text: str) -> TagFormat:
    return {"type": "const_string", "value": text}


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


def separated(tags: Sequence[TagFormat], separator: str, *, is_parallel: bool) -> TagFormat:
    """At least one of the tags; several only if `is_parallel`."""
    return {
        "type": "tags_with_separator",
        "tags": list(tags),
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not is_parallel,
    }


def calls_in_text(
    triggers: Sequence[str], tags: Sequence[TagFormat], *, is_parallel: bool, excludes: Sequence[str]
) -> TagFormat:
    """Free text without `excludes`, in which each trigger begins a tag, the first only unless `is_parallel`."""
    return {
        "type": "triggered_tags",
        "triggers": list(triggers),
        "tags": list(tags),
        "stop_after_first": not is_parallel,
        "excludes": list(excludes),
    }
