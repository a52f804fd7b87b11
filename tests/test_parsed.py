"""A parse does not fail because of what the garbage collector ends within it."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parsed import parsed

SOURCE = Path(ast.__file__).read_text(encoding="utf-8")


class Parsing:
    """Parses when it is collected, as whatever prints a traceback then."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        ast.parse("a + b * (c - d)")


@pytest.fixture
def garbage() -> Iterator[None]:
    thresholds = gc.get_threshold()
    gc.collect()
    gc.set_threshold(300, *thresholds[1:])  # of which a parse has many
    Parsing()
    yield
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("garbage")
def test_a_file_is_parsed_whatever_is_collected_meanwhile() -> None:
    assert len(parsed(SOURCE).body) == len(parsed(SOURCE).body)
    assert gc.isenabled()
