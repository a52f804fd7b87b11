"""/v1/embeddings over gangs that do not exist: every form of input and of answer, what is refused, and what is lost."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest

from tensorweave.cluster.protocol import Role
from tensorweave.router.bodies.embedding_body import EmbeddingBody
from tensorweave.router.http.app import build_app
from tests.router.fake_fleet import FakeLink, Fault, fake_embedding
from tests.router.serving import MODEL, client_of, make_service, model_info
from tests.router.small_tokenizers import byte_level

INFO = replace(model_info(), embedding_size=8)
EMBED = frozenset[Role]({"embed"})
PATH = "/v1/embeddings"


def embedder(**knobs: Any) -> FakeLink:
    return FakeLink(INFO, role="embed", **knobs)


def expected(token_ids: Sequence[int], dimensions: int | None = None) -> list[float]:
    vector = fake_embedding(token_ids, INFO)[:dimensions]
    return list((vector / np.linalg.norm(vector)).tolist())


def asked(fields: dict[str, Any], *links: FakeLink, path: str = PATH, roles: frozenset[Role] = EMBED) -> Any:
    async def ask() -> Any:
        app = build_app(make_service(*(links or (embedder(),)), roles=roles))
        async with client_of(app) as client:
            return await client.post(path, json={"model": MODEL, **fields})

    return asyncio.run(ask())


HELLO, WORLD = byte_level().encode("Hello"), byte_level().encode("world, again")


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("Hello", [HELLO]),
        (["Hello", "world, again"], [HELLO, WORLD]),
        (HELLO, [HELLO]),
        ([HELLO, WORLD], [HELLO, WORLD]),
        ([float(token) for token in HELLO], [HELLO]),
    ],
    ids=["text", "texts", "tokens", "lists of tokens", "tokens as numbers"],
)
def test_every_form_of_input(given: Any, inputs: list[list[int]]) -> None:
    answer = asked({"input": given})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["object"], told["model"]) == ("list", MODEL)
    assert [(one["object"], one["index"]) for one in told["data"]] == [("embedding", i) for i in range(len(inputs))]
    for one, token_ids in zip(told["data"], inputs, strict=True):
        assert one["embedding"] == pytest.approx(expected(token_ids), abs=1e-6)
    num_tokens = sum(map(len, inputs))
    assert told["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def test_base64_has_the_same_numbers() -> None:
    fields = {"input": ["Hello"], "encoding_format": "base64"}
    packed = asked(fields).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == pytest.approx(expected(HELLO), abs=1e-6)


def test_dimensions_are_cut_and_normalized_again() -> None:
    [one] = asked({"input": "Hello", "dimensions": 3}).json()["data"]
    assert one["embedding"] == pytest.approx(expected(HELLO, 3), abs=1e-6)


def test_tokens_are_cut_from_the_front() -> None:
    answer = asked({"input": "world, again", "truncate_prompt_tokens": 2}).json()
    assert answer["data"][0]["embedding"] == pytest.approx(expected(WORLD[-2:]), abs=1e-6)
    assert answer["usage"]["total_tokens"] == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", [5]]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": "no " * 2000}, "input"),
        ({"input": [5] * 512}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 9}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "temperature": 1}, "temperature"),
        ({"input": "a", "model": "another"}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    answer = asked(fields)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param


def test_a_service_without_the_kind_that_is_asked_for_says_so() -> None:
    answer = asked({"input": "a"}, FakeLink(INFO), roles=frozenset[Role]({"both"}))
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "this service gives no embeddings: it has no pool of role 'embed'",
    )
    answer = asked({"prompt": "a"}, path="/v1/completions")
    assert answer.status_code == 400
    assert "/v1/embeddings" in answer.json()["error"]["message"]


def test_an_engine_that_gives_none_is_named() -> None:
    answer = asked({"input": "a"}, FakeLink(model_info(), role="embed"))
    assert answer.status_code == 400
    assert "CPUs so far" in answer.json()["error"]["message"]


def test_only_gangs_that_embed_are_asked() -> None:
    embedding, both = embedder(), FakeLink(INFO, gang_id="other")
    assert asked({"input": ["a"] * 100}, both, embedding, roles=frozenset[Role]({"both", "embed"})).status_code == 200
    assert len(embedding.requests) == 100
    assert not both.requests
    assert all(request.sampling.wants_embedding for request in embedding.requests)


def test_a_gang_that_is_lost_costs_nothing() -> None:
    lost, other = embedder(faults=[Fault("error", closes=True)]), embedder(gang_id="other")
    answer = asked({"input": ["Hello", "world, again"]}, lost, other)
    assert [one["embedding"] for one in answer.json()["data"]] == [
        pytest.approx(expected(token_ids), abs=1e-6) for token_ids in (HELLO, WORLD)
    ]


def test_one_failure_ends_the_others() -> None:
    from tensorweave.cluster.errors import LogitsNotFinite

    link = embedder(faults=[Fault("error", error=LogitsNotFinite.of_model()), Fault("stall")])
    assert asked({"input": ["a", "b"]}, link).status_code == 500
    assert len(link.cancelled) == 1


def test_the_official_client() -> None:
    async def ask() -> None:
        async with client_of(build_app(make_service(embedder(), roles=EMBED))) as http:
            client = openai.AsyncOpenAI(base_url="http://router/v1", api_key="none", http_client=http)
            answer = await client.embeddings.create(model=MODEL, input=["Hello", "world, again"])  # as base64
            assert [one.embedding for one in answer.data] == [
                pytest.approx(expected(token_ids), abs=1e-6) for token_ids in (HELLO, WORLD)
            ]

    asyncio.run(ask())


def test_a_body_survives_the_way_to_a_worker_and_back() -> None:
    body = EmbeddingBody([[1, 2], [3]], is_base64=True, dimensions=4, cache_salt="s", priority=-1, timeout_s=2.5)
    assert EmbeddingBody.unpack(body.pack()) == body
