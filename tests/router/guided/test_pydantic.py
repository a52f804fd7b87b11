"""The schemas that pydantic makes of its types: answers are valid for pydantic itself."""

from __future__ import annotations

import datetime
import enum
import ipaddress
import pathlib
import uuid
from typing import Annotated, Any, Final, Literal

import pytest
from pydantic import (
    UUID4,
    AnyUrl,
    Base64Bytes,
    BaseModel,
    Field,
    IPvAnyAddress,
    PositiveInt,
    SecretStr,
    TypeAdapter,
    conlist,
)

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.params import GuideParams
from tests.router.guided.matchers import answers


class Kind(enum.Enum):
    ONE = 1
    X = "x"


class Node(BaseModel):
    name: str = Field(min_length=1, max_length=20)
    child: Node | None = None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    weight: float = Field(gt=0)


class Owner(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")
    others: list[Cat | Dog] = []


TYPES: Final[dict[str, Any]] = {
    "any": Any,
    "any_address": IPvAnyAddress,
    "base64": Base64Bytes,
    "bounded": Annotated[float, Field(ge=0, lt=1)],
    "bytes": bytes,
    "date": datetime.date,
    "datetime": datetime.datetime,
    "dict": dict[str, list[int]],
    "dict_of_literals": dict[Literal["a", "b"], int],
    "enum": Kind,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "list": conlist(int, min_length=1, max_length=3),
    "literal": Literal["a", 1, None],
    "multiple": Annotated[int, Field(multiple_of=5, ge=0)],
    "node": Node,
    "owner": Owner,
    "path": pathlib.Path,
    "pattern": Annotated[str, Field(pattern=r"^[\w-]+\.py$")],
    "positive": PositiveInt,
    "secret": SecretStr,
    "timedelta": datetime.timedelta,
    "tuple": tuple[int, str],
    "tuple_of_any_length": tuple[bool, ...],
    "union": int | str | None,
    "url": AnyUrl,
    "uuid": uuid.UUID,
    "uuid4": UUID4,
}
TOO_LARGE: Final = {"timedelta"}
"""Random durations are longer than Python's."""


@pytest.mark.parametrize("name", TYPES)
def test_answers_are_valid(name: str) -> None:
    adapter = TypeAdapter(TYPES[name])
    num_done = 0
    for answer in answers(guide_for(GuideParams(json=adapter.json_schema())), range(20)):
        if name not in TOO_LARGE:
            adapter.validate_json(answer.decode(errors="replace"))  # as a router decodes tokens
        num_done += 1
    assert num_done > 3


def test_a_set_is_refused_by_name() -> None:
    with pytest.raises(RequestRejected, match=r"'uniqueItems' .*is enforced for items from a list"):
        guide_for(GuideParams(json=TypeAdapter(set[str]).json_schema()))
