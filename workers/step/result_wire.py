"""A step's result as bytes, for the pipeline stages that have no logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack

from tensorweave.cluster.errors import TensorweaveError, error_from_wire
from tensorweave.cluster.protocol import logprobs_from_wire, logprobs_to_wire
from tensorweave.workers.step.plan import PromptRead, ScheduledBatch
from tensorweave.workers.step.request import LlmRequest, TokenExtras
from tensorweave.workers.step.result import PromptResult, RowResult, StepResult


def pack_result(result: StepResult) -> bytes:
    rows = [row if isinstance(row, list) else row.to_wire() for row in result.rows]
    extras = {place: [each.to_wire() for each in tokens] for place, tokens in result.extras.items()}
    packed: bytes = msgpack.packb([rows, extras, [_prompt_to_wire(prompt) for prompt in result.prompts]])
    return packed


def unpack_result(message: bytes, batch: ScheduledBatch) -> StepResult:
    """`batch` is the plan of the step, whose requests the result names by their order. The sender is a rank of the same
    gang."""
    rows, extras, prompts = msgpack.unpackb(message, strict_map_key=False)
    requests = {row.request.order: row.request for row in batch.context} if prompts else {}
    return StepResult(
        [_row_from_wire(row) for row in rows],
        {place: [TokenExtras.from_wire(each) for each in tokens] for place, tokens in extras.items()},
        [_prompt_from_wire(prompt, requests) for prompt in prompts],
    )


def _row_from_wire(row: Any) -> RowResult:
    return row if isinstance(row, list) else error_from_wire(row)


def _prompt_to_wire(prompt: PromptResult) -> list[Any]:
    read, failure = prompt.read, prompt.failure
    where = [read.request.order, read.start, read.stop, read.row]
    told = [logprobs_to_wire(prompt.logprobs), list(prompt.logits)]
    return [where, told, None if failure is None else failure.to_wire()]


def _prompt_from_wire(fields: Sequence[Any], requests: dict[int, LlmRequest]) -> PromptResult:
    (order, start, stop, row), (logprobs, logits), failure = fields
    error: TensorweaveError | None = None if failure is None else error_from_wire(failure)
    return PromptResult(
        PromptRead(requests[order], start, stop, row), logprobs_from_wire(logprobs), logits, failure=error
    )
