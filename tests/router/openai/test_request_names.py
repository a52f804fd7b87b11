"""Only the same request finds its answer again."""

from __future__ import annotations

from typing import Any

from tensorweave.cluster.guide import Guide
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.router.openai.request_names import RequestNames


def name(prompt: tuple[int, ...] = (1, 2), seed: int | None = None, salt: str | None = None, **fields: Any) -> str:
    return RequestNames("chatcmpl-1", "mine").of(0, prompt, SamplingSpec(5, **fields), seed, salt)


def test_what_makes_another_request() -> None:
    others = [
        name(),
        name(prompt=(1, 3)),
        name(seed=1),
        name(salt="x"),
        name(temperature=0.5),
        name(guide=Guide("regex", "a")),
        name(guide=Guide("regex", "b")),
        name(guide=Guide("ebnf", "b")),
    ]
    assert len(set(others)) == len(others)


def test_what_is_drawn_does_not() -> None:
    assert name(temperature=1.0, guide=Guide("regex", "a")) == RequestNames("chatcmpl-2", "mine").of(
        0, (1, 2), SamplingSpec(5, temperature=1.0, seed=77, guide=Guide("regex", "a")), None, None
    )
