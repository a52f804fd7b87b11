"""The answers of an executor, chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensorweave.cluster.protocol import TokenChunk
from tensorweave.workers.executor.executor import PyExecutor
from tests.workers.waiting import WAIT_S

Answers = Mapping[str, Sequence[TokenChunk]]


def collect_answers(executor: PyExecutor, names: Sequence[str]) -> Answers:
    """The chunks of these requests, until each has its last."""
    chunks: dict[str, list[TokenChunk]] = {name: [] for name in names}
    num_open = len(names)
    while num_open:
        came = executor.await_responses(timeout_s=WAIT_S)
        assert came, "nothing comes"
        for chunk in came:
            chunks[chunk.request_id].append(chunk)
            num_open -= chunk.is_last
    return chunks
