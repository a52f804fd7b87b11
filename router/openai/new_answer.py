"""`new_answer`: the `Answer` to a request, in the form of the API that it came by."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from tensorweave.router.anthropic.answer import MessagesAnswer
from tensorweave.router.bodies.request_body import Api, RequestBody
from tensorweave.router.openai.answer import Answer
from tensorweave.router.openai.answers import CHAT_SHAPE, COMPLETION_SHAPE, LEGACY_CHAT_SHAPE, AnswerShape, OpenAIAnswer
from tensorweave.router.openai.chat_request import ChatCompletionRequest
from tensorweave.router.openai.token_shapes import TokenShapes
from tensorweave.router.responses.answer import ResponsesAnswer
from tensorweave.router.service import RouterService

ID_PREFIXES: Final[Mapping[Api, str]] = {
    "completions": "cmpl-",
    "chat": "chatcmpl-",
    "messages": "msg_",
    "responses": "resp_",
}


def new_answer(service: RouterService, read: RequestBody, answer_id: str) -> Answer:
    tokens, now_s = TokenShapes(service.tokenizer), int(time.time())
    asked = read.request.model
    model_name = service.model_name if asked in service.names else asked  # an adapter's
    match read.api:
        case "messages":
            return MessagesAnswer(tokens, answer_id=answer_id, model_name=model_name)
        case "responses":
            return ResponsesAnswer(
                tokens, answer_id=answer_id, created_s=now_s, model_name=model_name, repeated=read.repeated
            )
        case "completions" | "chat":
            return OpenAIAnswer(
                _shape(read),
                read.request.telling,
                tokens,
                answer_id=answer_id,
                created_s=now_s,
                model_name=model_name,
                includes_usage=read.request.includes_usage,
                has_running_usage=read.request.has_running_usage,
            )


def _shape(read: RequestBody) -> AnswerShape:
    if not isinstance(read.request, ChatCompletionRequest):
        return COMPLETION_SHAPE
    return LEGACY_CHAT_SHAPE if read.request.tool_use.is_legacy else CHAT_SHAPE
