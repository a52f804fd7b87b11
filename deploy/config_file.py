"""A YAML document with the line of every key, and `--set a.b=c` overrides applied to it.

`deploy/config.py` reads a service's file with this. It refuses duplicate keys, keys that are not words, aliases that
form cycles, documents that are not a mapping, and malformed overrides, each with the file and the line. Mistakes are
reported together where possible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str, ...]


class ConfigError(ValueError):
    """Mistakes in a configuration, one per line, each with its place, key, value and remedy."""


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data, and the place of each key path ("file.yaml:7" or "--set a.b=c"). `mistakes` has a line for each part
    that is not in `data` because it is malformed."""

    source: str
    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """The place of the nearest key that was written, at or above `path`."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.source

    def holds(self, path: KeyPath) -> bool:
        return path in self.places

    def checked(self) -> Document:
        """Return the document itself. Raises ConfigError if it has mistakes."""
        if self.mistakes:
            raise ConfigError("\n".join(self.mistakes))
        return self


def read_document(path: str | Path, overrides: Iterable[str] = ()) -> Document:
    """Read the YAML file at `path` and apply `overrides` ("a.b=c", with values in YAML).

    Duplicate keys, keys that are not words and malformed overrides are in the document's `mistakes`.

    Raises:
        ConfigError: There is no such file, or it is not YAML.
    """
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{source}: cannot be read: {reason}") from None
    document = parse_document(text, source)
    for override in overrides:
        try:
            _apply_override(document, override)
        except ConfigError as error:
            document.mistakes.append(str(error))
    return document


def parse_document(text: str, source: str) -> Document:
    """Raises ConfigError if the text is not one YAML mapping; wrong keys are in the document's `mistakes`."""
    document = Document(source, {})
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return document
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{source}:{node.start_mark.line + 1}: a configuration is a mapping of keys to values")
        _walk(node, (), document, ())
        document.data.update(_copy_unshared(loader.construct_document(node)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        document.mistakes.append(f"{source}{line}: not valid YAML: {error.problem or error.context}")
        document.checked()
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{source}: not valid YAML: it holds the character {chr(error.character)!r}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    except ConfigError:
        raise
    except ValueError as error:  # a date such as 2001-02-30
        raise ConfigError(f"{source}: a value is not valid: {error}") from None
    return document


def _walk(node: yaml.Node, path: KeyPath, document: Document, parents: tuple[yaml.Node, ...]) -> None:
    if node in parents:
        raise ConfigError(
            f"{document.source}:{node.start_mark.line + 1}: {'.'.join(path)}: an alias that contains itself"
        )
    parents = (*parents, node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, str(index)), document, parents)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        if key_node.tag != "tag:yaml.org,2002:str":
            document.mistakes.append(f"{document.source}:{line}: key {key_node.value!r} is not a word")
            continue
        key = key_node.value
        key_path = (*path, key)
        if key in seen:
            document.mistakes.append(
                f"{document.source}:{line}: {'.'.join(key_path)} is given twice, first on line {seen[key]}"
            )
        seen.setdefault(key, line)
        document.places[key_path] = f"{document.source}:{line}"
        _walk(value_node, key_path, document, parents)


def _apply_override(document: Document, override: str) -> None:
    place = f"--set {override}"
    dotted, equals, text = override.partition("=")
    path = tuple(dotted.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"{place}: write it as key.key=value, for example --set router.port=9000")
    value = parse_document(f"value: {text}", place).checked().data["value"]
    table: Any = document.data
    for depth, key in enumerate(path[:-1], start=1):
        if table.get(key) is None:
            table[key] = {}
        table = table[key]
        if not isinstance(table, dict):
            raise ConfigError(f"{place}: {'.'.join(path[:depth])} is {table!r}, which holds no keys")
    table[path[-1]] = value
    for old in [known for known in document.places if known[: len(path)] == path]:
        del document.places[old]
    for end in range(1, len(path) + 1):
        document.places.setdefault(path[:end], place)
    _mark(document, path, value, place)


def _copy_unshared(value: Any) -> Any:
    """A copy without shared parts (YAML aliases), so that an override changes one place only, and without the keys that
    are not words."""
    if isinstance(value, dict):
        return {key: _copy_unshared(item) for key, item in value.items() if isinstance(key, str)}
    return [_copy_unshared(item) for item in value] if isinstance(value, list) else value


def _mark(document: Document, path: KeyPath, value: Any, place: str) -> None:
    document.places[path] = place
    if isinstance(value, dict):
        for key, item in value.items():
            _mark(document, (*path, str(key)), item, place)
