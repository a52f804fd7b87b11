"""`ResponsesAnswer`: the answers of /v1/responses. `router/responses/schemas.py` describes them for clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import orjson

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.router.chat.blocks import Blocks
from tensorweave.router.chat.parsed_choice import ParsedChunk
from tensorweave.router.openai.disaggregated import ContextPhase
from tensorweave.router.openai.schemas import Usage
from tensorweave.router.openai.token_shapes import TokenShapes
from tensorweave.router.openai.whole_choice import WholeChoice
from tensorweave.router.responses.output_items import OutputItems
from tensorweave.router.text.choices import Telling

_FAILURES: Final = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


class ResponsesAnswer:
    """The answer to one request, which has one choice.

    Args:
        tokens: Of the model's tokenizer.
        answer_id: The response's id.
        created_s: When it was created.
        model_name: The model's name in answers.
        repeated: JSON of what the answer repeats of the request.
    """

    def __init__(
        self,
        tokens: TokenShapes,
        *,
        answer_id: str,
        created_s: int,
        model_name: str,
        repeated: bytes,
    ) -> None:
        self._tokens = tokens
        asked: dict[str, Any] = orjson.loads(repeated)
        self._items = OutputItems(answer_id, has_summary=asked["reasoning"]["summary"] is not None)
        self._fields = {
            "id": answer_id,
            "object": "response",
            "created_at": created_s,
            "model": model_name,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "top_logprobs": 0,
            "truncation": "disabled",
            **asked,
        }
        self._blocks = Blocks()
        self._num_events = 0
        self._last: ParsedChunk | None = None

    def new_choice(self) -> WholeChoice:
        return WholeChoice(Telling(), self._tokens, None)

    def whole(self, choices: Sequence[WholeChoice], usage: Usage, phase: ContextPhase | None = None) -> bytes:
        [choice] = choices
        return orjson.dumps(self._ended(choice.blocks, choice.last, usage))

    def opening(self, num_choices: int, prompt: Sequence[int], usage: Usage) -> bytes:
        response = {**self._fields, "status": "in_progress", "output": [], "usage": None}
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    async def event(self, chunk: ParsedChunk, usage: Callable[[], Usage]) -> bytes:
        steps = list(self._blocks.add(chunk.deltas))
        if chunk.finish_reason is not None:
            self._last = chunk
            steps += self._blocks.end()
        events = [event for step in steps for event in self._items.events(step, is_cut=chunk.finish_reason == "length")]
        return b"".join([self._event(kind, **fields) for kind, fields in events])

    def closing(self, usage: Usage) -> bytes:
        assert self._last is not None, "the answer has not ended"
        response = self._ended(self._blocks, self._last, usage)
        return self._event(f"response.{response['status']}", response=response)

    def failure(self, error: TensorweaveError) -> bytes:
        problem = {"code": _FAILURES.get(error.http_status, "server_error"), "message": error.message}
        output = self._items.all(self._blocks.blocks, is_cut=True)
        response = {**self._fields, "status": "failed", "error": problem, "output": output, "usage": None}
        return self._event("response.failed", response=response)

    def _ended(self, blocks: Blocks, last: ParsedChunk, usage: Usage) -> dict[str, Any]:
        is_cut = last.finish_reason == "length"
        response = {
            **self._fields,
            "status": "incomplete" if is_cut else "completed",
            "output": self._items.all(blocks.blocks, is_cut=is_cut),
            "usage": _usage(usage),
        }
        return {**response, "incomplete_details": {"reason": "max_output_tokens"}} if is_cut else response

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(data))


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.completion_tokens_details.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
