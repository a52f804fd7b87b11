"""`MicroBatchScheduler`: shares a step's token and batch budgets among the requests that may run. The second
step of `SimpleScheduler`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from tensorweave.workers.executor.prompt_share import FixedShare, PendingContext, PromptLoad, PromptShare
from tensorweave.workers.step.plan import StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.tiles import whole_tiles

ChunkingPolicy = Literal["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"]


class MicroBatchScheduler:
    """Shares a step's budgets: one token for each generation request first, then context chunks, in order.

    A chunk that does not end its context ends on a block boundary, unless not even one block fits in a step's budget;
    and its step holds at most a multiple of `TILE` tokens, if it holds more than 256. A new context is not split if it
    fits whole into the next step and three quarters of this step's tokens are in use: the attention of whole prompts is
    faster, but the products of a step that was planned for 2,048 rows and has 1,300 are slower.
    How many prompt tokens it has beside decodes, `share` says.
    Without chunking a context waits until it fits whole; only one that is longer than any step (after a pause) is
    split.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_num_tokens: int,
        tokens_per_block: int,
        enable_chunked_prefill: bool = True,
        chunking_policy: ChunkingPolicy = "FIRST_COME_FIRST_SERVED",
        share: PromptShare | None = None,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._share = share or FixedShare(max_num_tokens)
        self._unit = tokens_per_block
        self._is_chunked = enable_chunked_prefill
        self._is_equal = chunking_policy == "EQUAL_PROGRESS"

    def schedule(
        self,
        fitting: Sequence[LlmRequest],
        starts: Mapping[int, int],
        waiting: Sequence[LlmRequest] = (),
        *,
        has_room: bool = True,
    ) -> tuple[tuple[StepRow, ...], tuple[StepRow, ...]]:
        """Chunks and decodes of the step. `starts` are those of new contexts; `waiting` are other requests, for which
        there is room or not."""
        decoding, fetching = RequestState.GENERATION, RequestState.FETCHING
        generation = StepRow.of_decodes(fitting)
        is_all_decoding = len(generation) == len(fitting)
        del generation[min(self._max_batch_size, self._max_num_tokens) :]
        if is_all_decoding:
            return (), tuple(generation)
        num_left = self._max_batch_size - len(generation)
        contexts = [r for r in fitting if r.state is not decoding and r.state is not fetching]
        pending = [(r, starts.get(r.order, r.num_launched)) for r in contexts[:num_left]]
        limit = self._max_num_tokens
        if generation and pending:
            load = PromptLoad([row[0] for row in generation], pending, waiting, has_room)
            limit = min(limit, len(generation) + self._share.most_tokens(load))
        return tuple(self._chunks(pending, len(generation), limit)), tuple(generation)

    def _chunks(self, pending: Sequence[PendingContext], num_decodes: int, limit: int) -> list[StepRow]:
        """`limit` bounds the step's tokens, decodes included."""
        if not self._is_chunked:
            return self._whole(pending, self._max_num_tokens - num_decodes, num_decodes)
        chunks: list[StepRow] = []
        if self._is_equal and sum(request.context_len - start for request, start in pending) > limit - num_decodes:
            chunks = self._equal(pending, max(whole_tiles(limit, num_decodes) - num_decodes, 0))
        return chunks or self._first_come(pending, num_decodes, limit)

    def _split(self, start: int, num_used: int, limit: int, edge: int, *, has_chunks: bool) -> int:
        """Length of a chunk from `start` that does not end its context, in a step of `num_used` tokens."""
        room = limit - num_used
        to_edge = edge - num_used
        rooms = (to_edge if to_edge >= 0 else room,) if has_chunks else (to_edge, room)
        for each in rooms:
            length = (start + each) // self._unit * self._unit - start
            if length > 0:
                return length
        return 0 if has_chunks else room

    def _whole(self, pending: Sequence[PendingContext], num_tokens: int, num_decodes: int) -> list[StepRow]:
        chunks: list[StepRow] = []
        for request, start in pending:
            length = request.context_len - start
            if length > self._max_num_tokens:
                return chunks or self._first_come([(request, start)], num_decodes, self._max_num_tokens)
            if length > num_tokens:
                break
            chunks.append(StepRow.of_context(request, start, length))
            num_tokens -= length
        return chunks

    def _first_come(self, pending: Sequence[PendingContext], num_decodes: int, limit: int) -> list[StepRow]:
        chunks: list[StepRow] = []
        num_used, edge = num_decodes, whole_tiles(limit, num_decodes)
        for request, start in pending:
            length = request.context_len - start
            if num_used + length > limit:
                is_new = request.state is RequestState.WAITING
                if is_new and num_decodes + length <= limit and 4 * num_used >= 3 * limit:
                    break
                length = self._split(start, num_used, limit, edge, has_chunks=bool(chunks))
                if length:
                    chunks.append(StepRow.of_context(request, start, length))
                break
            chunks.append(StepRow.of_context(request, start, length))
            num_used += length
        return chunks

    def _equal(self, pending: Sequence[PendingContext], num_tokens: int) -> list[StepRow]:
        """Round after round, each context moves on to its next block boundary, or to its end, while that fits."""
        ends = [start for _, start in pending]
        has_moved = True
        while has_moved and num_tokens:
            has_moved = False
            for i, (request, _) in enumerate(pending):
                step = min(ends[i] - ends[i] % self._unit + self._unit, request.context_len) - ends[i]
                if 0 < step <= num_tokens:
                    ends[i] += step
                    num_tokens -= step
                    has_moved = True
        return [
            StepRow.of_context(r, start, end - start)
            for (r, start), end in zip(pending, ends, strict=True)
            if end > start
        ]
