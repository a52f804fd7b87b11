"""`ApiSurface`: the public names of a class, from its code and its docstrings.

The generated API page and the stability tests read it. Types are spelled as in the source. Names that begin with an
underscore and methods that pydantic and dataclasses add are left out.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import pydantic
from pydantic_core import PydanticUndefined

from tensorweave.llmapi.docstrings import Docstring, read_docstring
from tensorweave.llmapi.status import api_status

FACTORY: Final = "<factory>"
"""Stands for a default that is made anew each time."""
REQUIRED: Final = "<required>"


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument, or a field that the constructor takes as an argument."""

    type: str
    default: Any = REQUIRED
    status: str | None = None
    text: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Method:
    parameters: Mapping[str, Parameter]
    returns: str
    status: str | None = None
    doc: Docstring = field(default_factory=Docstring, compare=False)


@dataclass(frozen=True, slots=True)
class ApiSurface:
    """`fields` can be set or passed to the constructor; `properties` can only be read."""

    name: str
    fields: Mapping[str, Parameter]
    methods: Mapping[str, Method]
    properties: Mapping[str, Parameter]
    doc: Docstring


def surface_of(cls: type[Any]) -> ApiSurface:
    """A name without a status of its own has that of its class."""
    doc, status = read_docstring(cls.__doc__), api_status(cls)
    own = {name: f for name, f in _fields(cls, doc).items() if not name.startswith("_")}
    fields = {name: dataclasses.replace(f, status=f.status or status) for name, f in own.items()}
    methods: dict[str, Method] = {}
    properties: dict[str, Parameter] = {}
    for name, member in _members(cls).items():
        if isinstance(member, property):
            assert member.fget is not None
            returns = spelled(inspect.signature(member.fget).return_annotation)
            text = doc.attributes.get(name) or read_docstring(member.fget.__doc__).text
            properties[name] = Parameter(returns, status=api_status(member.fget) or status, text=text)
        else:
            method = method_of(member, doc if name == "__init__" else None)
            methods[name] = dataclasses.replace(method, status=method.status or status)
    return ApiSurface(cls.__name__, fields, methods, properties, doc)


def method_of(function: Callable[..., Any], doc: Docstring | None = None) -> Method:
    """`doc` replaces the function's own docstring."""
    doc = doc or read_docstring(function.__doc__)
    signature = inspect.signature(function)
    parameters = {
        name: Parameter(
            spelled(parameter.annotation),
            REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default,
            text=doc.args.get(name, ""),
        )
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    }
    return Method(parameters, spelled(signature.return_annotation), api_status(function), doc)


def spelled(annotation: Any) -> str:
    """A type as the source spells it, with uniform spacing and quotes."""
    if annotation is inspect.Signature.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return ast.unparse(ast.parse(text, mode="eval"))


def _fields(cls: type[Any], doc: Docstring) -> dict[str, Parameter]:
    annotations = _annotations(cls)
    if issubclass(cls, pydantic.BaseModel):
        return {name: _model_field(annotations[name], info) for name, info in cls.model_fields.items()}
    if dataclasses.is_dataclass(cls):
        texts = {**doc.attributes, **doc.args}
        return {f.name: _dataclass_field(f, texts.get(f.name, "")) for f in dataclasses.fields(cls)}
    return {name: Parameter(spelled(type_), text=doc.attributes.get(name, "")) for name, type_ in annotations.items()}


def _model_field(annotation: Any, info: Any) -> Parameter:
    default = info.default
    if info.default_factory is not None:
        default = FACTORY
    elif default is PydanticUndefined:
        default = REQUIRED
    extra = info.json_schema_extra
    status = extra.get("status") if isinstance(extra, dict) else None
    return Parameter(spelled(annotation), default, status, info.description or "")


def _dataclass_field(f: dataclasses.Field[Any], text: str) -> Parameter:
    default = f.default
    if f.default_factory is not dataclasses.MISSING:
        default = FACTORY
    elif default is dataclasses.MISSING:
        default = REQUIRED
    return Parameter(spelled(f.type), default, f.metadata.get("status"), text)


def _annotations(cls: type[Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for base in reversed(cls.__mro__[:-1]):
        if base is not pydantic.BaseModel:
            merged |= inspect.get_annotations(base)
    return {name: type_ for name, type_ in merged.items() if "ClassVar" not in str(type_)}


def _members(cls: type[Any]) -> dict[str, Any]:
    """Functions and properties, of the bases first."""
    merged: dict[str, Any] = {}
    has_init = any("Args:" in (base.__doc__ or "") for base in cls.__mro__) and not dataclasses.is_dataclass(cls)
    for base in reversed(cls.__mro__[:-1]):
        if base.__module__.startswith("pydantic"):
            continue
        for name, member in base.__dict__.items():
            is_public = (name == "__init__" and has_init) or not name.startswith("_")
            if isinstance(member, classmethod | staticmethod):
                member = member.__func__
            if is_public and (isinstance(member, property) or inspect.isfunction(member)):
                merged[name] = member
            else:
                merged.pop(name, None)
    return merged
