"""`describe`: a mistake in a service's file as one line: place, key, value, message, and the nearest valid name."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic_core import ErrorDetails

from tensorweave.cluster.strict_model import RefusedKey
from tensorweave.deploy.config_file import Document, KeyPath


def describe(document: Document, item: ErrorDetails) -> str:
    context = item.get("ctx", {})
    path = tuple(str(part) for part in context.get("path", item["loc"]))
    match context.get("error"):
        case RefusedKey() as refused:
            path, message = (*path, refused.key), refused.reason
        case None:
            message = item["msg"]
        case error:
            message = str(error)
    if path[:1] == ("pools",) and len(path) > 2 and not document.holds(path) and document.holds(("engine", *path[2:])):
        path = ("engine", *path[2:])
    if item["type"] == "missing":
        return f"{document.place(path[:-1])}: {'.'.join(path)} is missing"
    if item["type"] == "literal_error":
        message += _nearest(item)
    if path[:1] == ("security",):  # may hold keys
        return f"{document.place(path).partition('=')[0]}: {'.'.join(path)}: {message}"
    written = f" = {_shorten(_value(document, path))}" if document.holds(path) else ""
    return f"{document.place(path)}: {'.'.join(path) or 'the file'}{written}: {message}"


def _nearest(item: ErrorDetails) -> str:
    known = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
    near = difflib.get_close_matches(str(item["input"]), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _value(document: Document, path: KeyPath) -> Any:
    value: Any = document.data
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
