"""`SchemaDocument`: a JSON schema as data, bounded in size and depth, with its references resolved."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import orjson

from tensorweave.router.guided.limits import GuidedLimits
from tensorweave.router.guided.refusal import Refusal

Schema = bool | dict[str, Any]


class SchemaDocument:
    """Made by `read_document`. `has_unevaluated`: it may have unevaluatedProperties somewhere."""

    def __init__(self, root: Schema, *, has_unevaluated: bool = False) -> None:
        self.root = root
        self.has_unevaluated = has_unevaluated
        self._id = root.get("$id") if isinstance(root, dict) else None

    def pointer_of(self, reference: Any, at: str) -> str:
        """The JSON pointer that a $ref names; "" is the root."""
        if not isinstance(reference, str):
            raise Refusal("$ref", at, "must be a string")
        base, _, fragment = reference.partition("#")
        if (base and base != self._id) or (fragment and not fragment.startswith("/")):
            raise Refusal("$ref", at, f"{reference[:200]!r} is no JSON pointer into this schema ('#' or '#/…')")
        return unquote(fragment)

    def schema_at(self, pointer: str, at: str) -> Schema:
        """What a pointer names. Raises Refusal if there is nothing."""
        found: Any = self.root
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isascii() and key.isdigit() and int(key) < len(found):
                found = found[int(key)]
            else:
                raise Refusal("$ref", at, f"there is nothing at {pointer[:200]!r}")
        return as_schema(found, pointer)


def as_schema(value: Any, at: str) -> Schema:
    if isinstance(value, bool | dict):
        return value
    raise Refusal(None, at, "a schema must be an object or a boolean")


def read_document(schema: str | dict[str, Any] | bool, limits: GuidedLimits) -> SchemaDocument:
    """Raises Refusal for a schema that is malformed, too large or too deep."""
    root = read_json(schema, limits)
    if (depth := depth_of(root)) > limits.max_depth:
        raise Refusal(None, "", f"the schema is nested {depth} levels deep; the limit is {limits.max_depth}")
    return SchemaDocument(as_schema(root, ""), has_unevaluated=b"unevaluated" in orjson.dumps(root))


def read_json(given: Any, limits: GuidedLimits) -> Any:
    """JSON as text or as data, bounded in size. Raises Refusal."""
    try:
        text = given.encode() if isinstance(given, str) else orjson.dumps(given)
    except (TypeError, ValueError) as error:  # orjson's own errors are TypeErrors
        raise Refusal(None, "", f"this is no JSON: {error}") from None
    check_size(text, limits)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Refusal(None, "", f"this is no JSON: {error.msg} at byte {error.pos}") from None


def check_size(text: str | bytes, limits: GuidedLimits) -> None:
    if len(text) <= limits.max_bytes // 4:
        return
    num_bytes = len(text) if isinstance(text, bytes) else len(text.encode("utf-8", "surrogatepass"))
    if num_bytes > limits.max_bytes:
        raise Refusal(None, "", f"it has {num_bytes} bytes; the limit is {limits.max_bytes}")


def depth_of(value: Any) -> int:
    """Levels of nesting of JSON data."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def step(pointer: str, *keys: str | int) -> str:
    """The JSON pointer of something below."""
    return pointer + "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)
