"""A host that a rank cannot connect to is named."""

from __future__ import annotations

import socket

import pytest

from tensorweave.cluster.errors import WorkerLost
from tensorweave.workers.gang.reachability import await_reachable


def test_a_host_that_cannot_be_reached_is_named_with_who_waits_for_it() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # nobody listens there
        port = unheard.getsockname()[1]
        with pytest.raises(WorkerLost, match=rf"rank 1 on h2 cannot reach rank 0 at 127.0.0.1:{port} \(.*refused.*\)"):
            await_reachable("127.0.0.1", port, 0.2, who="rank 1 on h2", whom="rank 0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        await_reachable("127.0.0.1", server.getsockname()[1], 60.0, who="rank 1", whom="rank 0")
