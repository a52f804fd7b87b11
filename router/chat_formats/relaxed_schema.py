"""`relaxed`: a schema without the keywords that xgrammar does not enforce, for functions that are not strict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_BOUNDS: Final = frozenset({"minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_MAPS: Final = frozenset({"properties", "$defs", "definitions"})
_LISTS: Final = frozenset({"prefixItems", "anyOf", "oneOf", "allOf"})
_SINGLE: Final = frozenset({"items", "additionalProperties"})
_KEPT: Final = frozenset({"$ref", "type", "enum", "const", "required", *_BOUNDS, *_MAPS, *_LISTS, *_SINGLE})
_MAX_DEPTH: Final = 32


def relaxed(schema: Any, depth: int = 0) -> Any:
    """The schema with the keywords that are always enforced: types, values, properties, items, bounds, references and
    alternatives. Objects get no other properties than they declare."""
    if not isinstance(schema, Mapping) or depth == _MAX_DEPTH:
        return schema if isinstance(schema, bool) else {}
    kept = {key: _relaxed_value(key, value, depth + 1) for key, value in schema.items() if key in _KEPT}
    if "properties" in kept:
        kept.pop("additionalProperties", None)
    return kept


def _relaxed_value(key: str, value: Any, depth: int) -> Any:
    if key in _MAPS and isinstance(value, Mapping):
        return {name: relaxed(one, depth) for name, one in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [relaxed(one, depth) for one in value]
    return relaxed(value, depth) if key in _SINGLE and isinstance(value, Mapping) else value
