"""Compiles the native kernels before tests wait for them, and raises the timeouts of connections, so that a pause of
the machine is not taken for a hung peer: of KV transfers and of a gang's ranks always, of a leader's socket if a test
asks for it."""

from __future__ import annotations

import functools

import pytest
import torch

from tensorweave.cluster import socket_link, wire
from tensorweave.kernels.native.library import load_native
from tensorweave.workers.gang import listener
from tensorweave.workers.transfer.carriers import tcp_client, tcp_server
from tensorweave.workers.transfer.transports.frame_connection import FrameConnection
from tests.workers.waiting import WAIT_S


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels() -> None:
    """If they are new, this takes as long as the compiler."""
    load_native(torch.float32)


@pytest.fixture(autouse=True)
def _patient_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "GREETING_TIMEOUT_S", WAIT_S)
    for module in (tcp_server, tcp_client):
        monkeypatch.setattr(module, "FrameConnection", functools.partial(FrameConnection, silence_s=WAIT_S))


@pytest.fixture
def patient_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HELLO_TIMEOUT_S", WAIT_S)
    monkeypatch.setattr(socket_link, "SILENCE_LIMIT_S", WAIT_S)
