"""Parameters that models write in Python's notation."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from tensorweave.router.chat_formats.parameter_types import _convert_nested


def test_pythons_notation_becomes_json() -> None:
    assert _convert_nested("{'a': [1, None, True]}", "{") == '{"a": [1, null, true]}'


@pytest.mark.parametrize(("num_failures", "expected"), [(1, "[1, 2]"), (2, None)])
def test_a_parse_that_the_garbage_collector_spoils_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, num_failures: int, expected: str | None
) -> None:
    read, texts = ast.literal_eval, list[str]()

    def spoilt(text: str) -> Any:
        texts.append(text)
        if len(texts) <= num_failures:
            raise SystemError("AST constructor recursion depth mismatch (before=39, after=59)")
        return read(text)

    monkeypatch.setattr(ast, "literal_eval", spoilt)
    assert _convert_nested("(1, 2)", "[") == expected
