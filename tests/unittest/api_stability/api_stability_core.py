"""What the stability tests compare: schemas in YAML with signatures, docstrings and statuses in code.

The schemas have the form that the LLM API change guide shows. A file is a mapping of names. An argument, field or
property is `{type, default, status}`, without `default` where there is none to give; a method is `{status, parameters,
returns}` with `parameters` a list of `{name, type, default}`. (TensorRT-LLM's own harness reads another form than its
guide documents: `methods` and `properties` with evaluated annotations. Ours is the documented one.) Types are spelled
as in the source; a default made anew each time is `<factory>`. What has a `status` is in `references/`, what is
committed, and has none, in `references_committed/`.

Every check returns sentences, one for each thing that is wrong.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tensorweave.llmapi.api_surface import REQUIRED, ApiSurface, Method, Parameter, surface_of

SCHEMAS = Path(__file__).resolve().parent
Schema = dict[str, dict[str, Any]]

_COMMITTED = "committed: it may not change without a new major version and its reviewers' approval"
_REFERENCE = "update the schema in references/ and ask its reviewers"


def schema_of(cls: type[Any]) -> Schema:
    """As code has it, statuses included."""
    surface = surface_of(cls)
    schema = {name: _entry(parameter) for name, parameter in (surface.fields | surface.properties).items()}  # type: ignore[operator]
    return schema | {name: _method_entry(method) for name, method in surface.methods.items()}


def read_schema(root: Path, name: str) -> tuple[Schema, Schema]:
    """(committed, references) of one class; a file that is not there is empty."""
    found = []
    for folder in ("references_committed", "references"):
        path = root / folder / f"{name}.yaml"
        found.append(yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.exists() else {})
    return found[0], found[1]


def signature_problems(cls: type[Any], name: str, root: Path = SCHEMAS) -> list[str]:
    """Signatures contain what is committed, and equal committed plus references; no name is in both."""
    committed, references = read_schema(root, name)
    actual = schema_of(cls)
    problems = [f"{name}.{each} is in references and in references_committed" for each in committed.keys() & references]
    for folder, entries, advice in (("committed", committed, _COMMITTED), ("references", references, _REFERENCE)):
        for each, entry in entries.items():
            if each not in actual:
                problems.append(f"{name}.{each} is gone ({folder}): {advice}")
            elif (mine := _bare(actual[each])) != (theirs := _bare(entry)):
                problems.append(f"{name}.{each} is {mine}, its schema says {theirs}: {advice}")
    new = actual.keys() - committed.keys() - references.keys()
    return problems + [f"{name}.{each} is new: {_REFERENCE}" for each in sorted(new)]


def status_problems(cls: type[Any], name: str, root: Path = SCHEMAS) -> list[str]:
    """What is committed has no status; what is not has the same one in code and in YAML."""
    committed, references = read_schema(root, name)
    actual = schema_of(cls)
    problems = []
    for each, entry in committed.items():
        for where, status in (("code", actual.get(each, {}).get("status")), ("its schema", entry.get("status"))):
            if status is not None:
                problems.append(f"{name}.{each} is committed and has the status {status!r} in {where}")
    for each, entry in references.items():
        mine, theirs = actual.get(each, {}).get("status"), entry.get("status")
        if theirs not in ("prototype", "beta", "deprecated") or mine != theirs:
            problems.append(f"{name}.{each} has the status {mine!r} in code and {theirs!r} in its schema")
    return problems


def docstring_problems(cls: type[Any]) -> list[str]:
    """Everything public is described, nothing else is, and what is returned is said."""
    try:
        surface = surface_of(cls)
    except ValueError as error:
        return [f"{cls.__name__}: {error}"]
    problems = [] if len(surface.doc.text) > 1 else [f"{cls.__name__} has no docstring"]
    for name, parameter in (surface.fields | surface.properties).items():  # type: ignore[operator]
        if len(parameter.text) <= 1:
            problems.append(f"{cls.__name__}.{name} is not described")
    public = {*surface.fields, *surface.properties, *surface.methods}
    described = surface.doc.attributes.keys() | (
        surface.doc.args.keys() if "__init__" not in surface.methods else set()
    )
    problems += [f"{cls.__name__} describes {name}, which it has not" for name in sorted(described - public)]
    for name, method in surface.methods.items():
        problems += [f"{cls.__name__}.{name} {problem}" for problem in _method_problems(name, method)]
    return problems


def _method_problems(name: str, method: Method) -> list[str]:
    problems = [] if len(method.doc.text) > 1 else ["has no docstring"]
    if list(method.doc.args) != list(method.parameters):
        problems.append(f"has the arguments {list(method.parameters)} and describes {list(method.doc.args)}")
    problems += [f"does not describe {arg}" for arg, text in method.doc.args.items() if len(text) <= 1]
    if (method.returns not in ("None", "NoReturn")) != (len(method.doc.returns) > 1):
        problems.append(f"returns {method.returns}; its docstring says {method.doc.returns or 'nothing'!r}")
    if name != "__init__" and (method.doc.status or None) != method.status:
        problems.append(f"has the status {method.status} and says {method.doc.status!r}")
    return problems


def _entry(parameter: Parameter, name: str | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {} if name is None else {"name": name}
    entry["type"] = parameter.type
    if parameter.default is not REQUIRED:
        default = parameter.default
        entry["default"] = list(default) if isinstance(default, tuple) else default
    return entry if parameter.status is None else {**entry, "status": parameter.status}


def _method_entry(method: Method) -> dict[str, Any]:
    parameters = [_entry(parameter, name) for name, parameter in method.parameters.items()]
    entry: dict[str, Any] = {} if method.status is None else {"status": method.status}
    return {**entry, "parameters": parameters, "returns": method.returns}


def _bare(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "status"}


def dump(cls: type[Any], is_committed: bool) -> str:
    """The YAML of what is, or is not, committed in code: to start a new schema from."""
    entries = {name: entry for name, entry in schema_of(cls).items() if ("status" not in entry) == is_committed}
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=120)


def copy_of_schemas(root: Path) -> Path:
    """In `root`, to try a change on."""
    for folder in ("references", "references_committed"):
        shutil.copytree(SCHEMAS / folder, root / folder)
    return root


def edit(root: Path, file: str, change: Callable[[Schema], Schema]) -> None:
    path = root / file
    path.write_text(yaml.safe_dump(change(yaml.safe_load(path.read_text())), sort_keys=False))


__all__ = [
    "SCHEMAS",
    "ApiSurface",
    "copy_of_schemas",
    "docstring_problems",
    "dump",
    "edit",
    "schema_of",
    "signature_problems",
    "status_problems",
]

if __name__ == "__main__":
    import importlib

    home, _, class_name = sys.argv[1].partition(":")
    print(dump(getattr(importlib.import_module(home), class_name), "--committed" in sys.argv))
