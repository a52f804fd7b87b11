"""`LogitsWatch`: requests whose logits were not finite (NaN or infinity), and whether their gang is to blame.

Such a request ends with its own error. After `PATIENCE` steps in a row without one finite row, the step loop runs
probes, prompts of one token each. If no probe's logits are finite either, the weights, the memory or a device are at
fault and the loop ends, so that the pool replaces the gang. If one probe's are, the requests themselves are at fault
and the gang goes on. All of it follows from the logits alone, so every rank decides alike.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Final

from tensorweave.cluster.errors import LogitsNotFinite, WorkerLost
from tensorweave.cluster.protocol import ModelInfo, SamplingSpec, TokenChunk
from tensorweave.workers.step.request import LlmRequest

logger = logging.getLogger(__name__)

PATIENCE: Final = 3
NUM_PROBES: Final = 4
_NAME: Final = "\0probe-"


class LogitsWatch:
    """One executor's; `rank` 0 writes the log."""

    def __init__(self, info: ModelInfo, rank: int) -> None:
        self.num_failed = 0
        self._tokens = [info.vocab_size * (2 * i + 1) // (2 * NUM_PROBES) for i in range(NUM_PROBES)]
        self._rank = rank
        self._num_bad_steps = 0
        self._running: set[str] = set()
        self._has_finite_probe = self._has_probed = False

    def note(self, num_sampled: int, finished: Sequence[LlmRequest]) -> None:
        """Note how many rows a step has sampled and which requests have ended with it, failed ones among them. Raises
        WorkerLost if the gang is at fault."""
        probes = [request for request in finished if request.request_id in self._running]
        if probes:
            self._judge(probes)
        num_asked = num_sampled - len(probes)
        if not num_asked:
            return
        bad = [r for r in finished if isinstance(r.failure, LogitsNotFinite) and r not in probes]
        self._num_bad_steps = self._num_bad_steps + 1 if len(bad) == num_asked else 0
        self.num_failed += len(bad)
        if self._rank == 0:
            for request in bad:
                where = f"{request.prompt_len} prompt and {request.num_output} output tokens"
                logger.error("request %s: the logits after %s are not finite", request.request_id, where)

    def start_probes(self, order: int, now_s: float) -> Iterator[LlmRequest]:
        """Make the probes that are due, which run like any other request and are answered to nobody. `order` is that of
        the newest request."""
        if self._num_bad_steps < PATIENCE or self._running:
            return
        self._num_bad_steps, self._has_finite_probe, self._has_probed = 0, False, True
        for i, token in enumerate(self._tokens, 1):
            name = f"{_NAME}{order + i}"
            self._running.add(name)
            yield LlmRequest(name, order + i, [token], 1, SamplingSpec(1), cache_salt=name, arrival_s=now_s)

    def without_probes(self, chunks: Sequence[TokenChunk]) -> Sequence[TokenChunk]:
        """The chunks without those of probes."""
        if not self._has_probed:
            return chunks
        return [chunk for chunk in chunks if not chunk.request_id.startswith(_NAME)]

    def _judge(self, probes: Sequence[LlmRequest]) -> None:
        self._running.difference_update(probe.request_id for probe in probes)
        self._has_finite_probe |= any(probe.failure is None for probe in probes)
        if self._running:
            return
        if not self._has_finite_probe:
            raise WorkerLost(
                f"no logits are finite any more: {PATIENCE} steps in a row gave NaN or infinity alone, and so do "
                f"{NUM_PROBES} prompts of one token"
            )
        if self._rank == 0:
            logger.warning(
                "%d steps in a row gave no finite logits, but prompts of one token do: the requests are at fault, "
                "and this gang goes on",
                PATIENCE,
            )
