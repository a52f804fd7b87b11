"""What becomes of each keyword of JSON Schema, as data. docs/structured_output.md has the same table for users."""

from __future__ import annotations

from typing import Any, Final

TYPES: Final = ("object", "array", "string", "number", "integer", "boolean", "null")

ANNOTATIONS: Final = frozenset(
    {
        "$comment",
        "$defs",
        "$schema",
        "default",
        "definitions",
        "deprecated",
        "description",
        "discriminator",
        "enumDescriptions",
        "enumNames",
        "errorMessage",
        "example",
        "examples",
        "externalDocs",
        "format_description",
        "id",
        "markdownDescription",
        "propertyOrdering",
        "readOnly",
        "title",
        "tsType",
        "writeOnly",
        "xml",
    }
)
"""They restrict nothing; neither do keywords that begin with `x-`."""

FAMILIES: Final[dict[str, frozenset[str]]] = {
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format", "contentEncoding"}),
    "array": frozenset({"items", "prefixItems", "additionalItems", "minItems", "maxItems"}),
    "object": frozenset(
        {
            "properties",
            "required",
            "additionalProperties",
            "patternProperties",
            "propertyNames",
            "minProperties",
            "maxProperties",
        }
    ),
}
"""The keywords that restrict values of one type."""

COMBINING: Final = frozenset(
    {
        "$ref",
        "allOf",
        "anyOf",
        "const",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "enum",
        "if",
        "maxContains",
        "minContains",
        "not",
        "oneOf",
        "then",
        "type",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "$anchor": (),
    "$dynamicAnchor": (),
    "$dynamicRef": (),
    "$recursiveAnchor": (False,),
    "$recursiveRef": (),
    "$vocabulary": (),
    "contentMediaType": ("application/octet-stream", "text/plain"),
    "contentSchema": (True, {}),
    "nullable": (False,),
}
"""Keywords that nobody enforces, each with the values at which it restricts nothing."""

REMEDIES: Final[dict[str, str]] = {
    "nullable": 'write {"type": [..., "null"]}',
    "$anchor": "refer by JSON pointer, '#/$defs/…'",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
}

KNOWN: Final = frozenset(
    {*ANNOTATIONS, *COMBINING, *NEUTRAL, *(k for family in FAMILIES.values() for k in family), "$id"}
)
