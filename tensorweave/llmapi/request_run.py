"""Runs one prepared request to its end on the LLM's event loop and pushes every update to its output."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import aclosing

from tensorweave.cluster.errors import raised_by_user
from tensorweave.llmapi.completion_output import Update
from tensorweave.llmapi.engine import Engine
from tensorweave.llmapi.phases import run_context_phase
from tensorweave.llmapi.request_maker import PreparedRequest
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.text.generation import generate_all


async def run_request(dispatcher: Dispatcher, engine: Engine, prepared: PreparedRequest) -> None:
    try:
        if prepared.processors:
            await engine.set_logits_processors(prepared.processors)
        try:
            await _run(dispatcher, prepared)
        finally:
            if prepared.processors:
                await engine.set_logits_processors(dict.fromkeys(prepared.processors))
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # the request's boundary: every consumer that waits for the output must get it
        prepared.output._push(Update(error=error if isinstance(error, Exception) else raised_by_user(error)))


async def _run(dispatcher: Dispatcher, prepared: PreparedRequest) -> None:
    output, begun = prepared.output, set[int]()

    def push(update: Update) -> None:
        if update.index not in begun:
            begun.add(update.index)
            ids = [*prepared.echo_ids, *update.token_ids]
            update = dataclasses.replace(update, text=prepared.echo_text + update.text, token_ids=ids)
        output._push(update)

    if prepared.jobs[0].request.offer is not None:
        push(await run_context_phase(dispatcher, prepared.jobs[0]))
        return
    async with aclosing(generate_all(dispatcher, prepared.jobs)) as deltas:
        async for delta in deltas:
            push(Update.of(delta))
