"""`stop_reason`: null for the model's own end token, and the token id if the client requested that stop token."""

from __future__ import annotations

from typing import Any

import pytest

from tests.router.calls import CHAT, COMPLETIONS, post, scripted
from tests.router.serving import IM_END, chat, completion


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (COMPLETIONS, completion())])
@pytest.mark.parametrize(
    ("fields", "stop_reason"),
    [
        ({}, None),
        ({"stop_token_ids": [IM_END]}, None),
        ({"ignore_eos": True, "stop_token_ids": [IM_END]}, IM_END),
    ],
)
def test_the_end_of_sequence(path: str, body: dict[str, Any], fields: dict[str, Any], stop_reason: int | None) -> None:
    [choice] = post(path, body | {"max_tokens": 100} | fields, scripted()).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop_reason)
