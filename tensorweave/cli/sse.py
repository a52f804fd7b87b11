"""Server-sent events of an OpenAI endpoint, line by line; used by the chat client and the load generator."""

from __future__ import annotations

import json
from typing import Any, Final

DONE: Final = "[DONE]"


def event_data(line: str) -> dict[str, Any] | None:
    """The JSON object of a `data:` line; None for blank lines, comments, other fields and the closing [DONE].

    Raises:
        ValueError: a data line that holds no JSON object.
    """
    if not line.startswith("data:"):
        return None
    text = line[len("data:") :].strip()
    if text == DONE:
        return None
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError(f"an event is no JSON object: {text[:80]}")
    return data


def event_text(event: dict[str, Any]) -> str:
    """New text in a completion or chat chunk; empty where it brings none."""
    for choice in event.get("choices") or ():
        text = choice["text"] if "text" in choice else (choice.get("delta") or {}).get("content")
        if text:
            return str(text)
    return ""


def event_reasoning(event: dict[str, Any]) -> str:
    """New reasoning in a chat chunk; empty where it brings none."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if text := delta.get("reasoning") or delta.get("reasoning_content"):
            return str(text)
    return ""


def error_message(body: Any, fallback: str) -> str:
    """The message of OpenAI's error object, wherever the server nested it."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and error.get("message"):
        return str(error["message"])
    return fallback
