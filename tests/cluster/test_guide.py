from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import pytest

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.guide import Guide
from tensorweave.cluster.sampling_spec import SamplingSpec

GUIDE = Guide("json_schema", '{"type": "object"}')


def test_a_spec_carries_its_guide_over_the_wire() -> None:
    spec = SamplingSpec(9, guide=dataclasses.replace(GUIDE, backend="llguidance", max_whitespace=0))
    assert SamplingSpec.from_wire(msgpack.unpackb(msgpack.packb(spec.to_wire()))) == spec
    assert "guide" not in SamplingSpec(9).to_wire()


@pytest.mark.parametrize(
    "change", [{"kind": "regex"}, {"text": "{}"}, {"backend": "llguidance"}, {"max_whitespace": 7}]
)
def test_the_digest_differs_with_every_field(change: dict[str, Any]) -> None:
    assert dataclasses.replace(GUIDE).digest == GUIDE.digest
    assert dataclasses.replace(GUIDE, **change).digest != GUIDE.digest


@pytest.mark.parametrize(
    "fields",
    [
        [],
        7,
        ["json", "{}", "xgrammar", 8],
        [["json"], "{}", "xgrammar", 8],
        ["regex", "a", "outlines", 8],
        ["regex", b"a", "xgrammar", 8],
        ["regex", "a", "xgrammar", None],
    ],
)
def test_malformed_guides_are_refused(fields: Any) -> None:
    with pytest.raises(WireError):
        Guide.from_wire(fields)


def test_a_guides_text_is_not_shown() -> None:
    """It may have words of a user's own."""
    assert "object" not in repr(SamplingSpec(9, guide=GUIDE))
