"""The native kernels are there before a test waits for what needs them, and nobody is taken for hung because the
machine stood still: no peer of a KV transfer, nor, where a test asks for that, of a leader's socket."""

from __future__ import annotations

import functools

import pytest
import torch

from tensorweave.cluster import socket_link, wire
from tensorweave.kernels.native.library import load_native
from tensorweave.workers.transfer.carriers import tcp_client, tcp_server
from tensorweave.workers.transfer.transports.frame_connection import Stream
from tests.workers.waiting import WAIT_S


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels() -> None:
    """Where they are new, this takes as long as the compiler does."""
    load_native(torch.float32)


@pytest.fixture(autouse=True)
def _patient_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tcp_server, tcp_client):
        monkeypatch.setattr(module, "Stream", functools.partial(Stream, silence_s=WAIT_S))


@pytest.fixture
def patient_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HELLO_TIMEOUT_S", WAIT_S)
    monkeypatch.setattr(socket_link, "SILENCE_LIMIT_S", WAIT_S)
