"""An address without a Ray head that takes us is told within seconds, and why."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from ray.exceptions import AuthenticationError

from tensorweave.cluster.ray_address import check_ray_address

OWN_HOST = "127.77.1.21"
"""Ray takes 127.0.0.1 for the host's own address; nobody else takes a port of this one that we have just let go."""


@pytest.fixture
def listener() -> Iterator[str]:
    with socket.create_server((OWN_HOST, 0)) as server:
        yield f"{OWN_HOST}:{server.getsockname()[1]}"


def test_a_head_that_answers_is_good(listener: str) -> None:
    asked: list[str] = []
    check_ray_address(listener, connect=asked.append)
    assert asked == [listener]


def test_nobody_at_the_address() -> None:
    with socket.socket() as unheard:
        unheard.bind((OWN_HOST, 0))
        port = unheard.getsockname()[1]
        with pytest.raises(ConnectionError, match=rf"no Ray head listens at {OWN_HOST}:{port} \(.*refused.*\)"):
            check_ray_address(f"{OWN_HOST}:{port}", listen_timeout_s=0.2)


def test_a_listener_that_is_no_head(listener: str) -> None:
    never = threading.Event()
    try:
        with pytest.raises(ConnectionError, match="does not answer as a Ray head"):
            check_ray_address(listener, connect=lambda _: never.wait(60.0), answer_timeout_s=0.2)
    finally:
        never.set()


def test_a_wrong_token_is_named(listener: str) -> None:
    def refuse(_: str) -> None:
        raise AuthenticationError("InvalidAuthToken")

    with pytest.raises(ConnectionError, match=r"refuses our token: .* RAY_AUTH_TOKEN_PATH"):
        check_ray_address(listener, connect=refuse)
