"""A private Ray asks for a token that nobody else knows, and a cluster that asks for none is known as such."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray._private.services import GCS_SERVER_EXECUTABLE
from ray._raylet import AuthenticationMode, get_authentication_mode

from tensorweave.cluster.ray_auth import UnauthenticatedRay, asks_for_token, forget_token, refuse_open_ray, token_mode
from tensorweave.cluster.ray_session import RaySession
from tests.e2e.service_process import END_TIMEOUT_S, free_ports, wait_until

NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@contextmanager
def head(directory: Path, **environment: str) -> Iterator[str]:
    """The address of a Ray head's control store, all of Ray that a stranger's question needs."""
    [port] = free_ports(1)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    server = subprocess.Popen(
        [
            *(GCS_SERVER_EXECUTABLE, f"--gcs_server_port={port}", "--node-ip-address=127.0.0.1", "--session-name=s"),
            *("--config_list=e30=", f"--log_dir={directory}", f"--session-dir={directory}", "--metrics-agent-port=0"),
            f"--node-id={'0' * 56}",
        ],
        env=kept | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: is_up(f"127.0.0.1:{port}"), END_TIMEOUT_S, "the control store answers")
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait(END_TIMEOUT_S)


def is_up(address: str) -> bool:
    try:
        asks_for_token(address)
    except ConnectionError:
        return False
    return True


def join(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As if this process had joined the cluster there."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))


def test_a_cluster_that_asks_for_no_token_is_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with head(tmp_path, RAY_AUTH_MODE="disabled") as address:
        assert not asks_for_token(address)
        join(monkeypatch, address)
        with pytest.raises(UnauthenticatedRay, match=r"RAY_AUTH_MODE=token .* security\.allow_unauthenticated_ray"):
            refuse_open_ray(is_allowed=False)
        refuse_open_ray(is_allowed=True)
        with pytest.warns(RuntimeWarning, match="can run code on it"):
            RaySession(is_owner=False, is_private=False).warn_if_open()


def test_a_cluster_that_asks_for_a_token_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with head(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="5" * 64) as address:
        assert asks_for_token(address)
        join(monkeypatch, address)
        refuse_open_ray(is_allowed=False)
        RaySession(is_owner=False, is_private=False).warn_if_open()


def test_where_nobody_answers_nothing_is_claimed() -> None:
    [port] = free_ports(1)
    with pytest.raises(ConnectionError, match=f"Ray does not answer at 127.0.0.1:{port}"):
        asks_for_token(f"127.0.0.1:{port}")


@pytest.fixture
def _as_before() -> Iterator[None]:
    yield
    forget_token()


@pytest.mark.usefixtures("_as_before")
def test_the_token_is_random_and_leaves_no_trace_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    tokens = set()
    for _ in range(2):
        with token_mode():
            tokens.add(os.environ["RAY_AUTH_TOKEN"])
            assert os.environ["RAY_AUTH_MODE"] == "token"
        assert [os.environ.get(name) for name in NAMES] == ["disabled", None, None]
        assert get_authentication_mode() == AuthenticationMode.TOKEN, "this process still has to speak to its Ray"
    assert sorted(map(len, tokens)) == [64, 64]
    forget_token()
    assert get_authentication_mode() == AuthenticationMode.DISABLED


@pytest.mark.usefixtures("_as_before")
def test_a_start_that_fails_forgets_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(OSError), token_mode():
        raise OSError
    assert get_authentication_mode() == AuthenticationMode.DISABLED


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_of_the_users_is_kept(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for other in NAMES:
        monkeypatch.delenv(other, raising=False)
    (tmp_path / "token").write_text("7" * 64, encoding="utf-8")
    given = "7" * 64 if name == "RAY_AUTH_TOKEN" else str(tmp_path / "token")
    monkeypatch.setenv(name, given)
    with token_mode():
        assert {other: os.environ.get(other) for other in NAMES} == {**dict.fromkeys(NAMES), name: given} | {
            "RAY_AUTH_MODE": "token"
        }
    assert os.environ[name] == given
