"""Too long for the model, in the words that OpenAI's clients look for."""

from __future__ import annotations

from tensorweave.cluster.context_length import context_exceeded, context_exceeded_by_at_least, prompt_limit_exceeded
from tensorweave.cluster.errors import ContextTooLong, error_from_wire


def test_the_message_is_openais() -> None:
    error = context_exceeded(8192, 8900, 100, prompt_param="messages")
    assert error.param == "messages"
    assert error.message == (
        "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (8900 in the "
        "messages, 100 in the completion). Please reduce the length of the messages or completion."
    )
    error = context_exceeded(8192, 9000, prompt_param="messages")
    assert error.param == "messages"
    assert error.message == (
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens. "
        "Please reduce the length of the messages."
    )
    error = context_exceeded(8192, 8000, 1000, prompt_param="messages")
    assert error.param == "max_tokens"
    assert "you requested 9000 tokens (8000 in the messages, 1000 in the completion)" in error.message
    assert error.message.endswith("messages or completion. max_tokens may be at most 192.")
    error = context_exceeded_by_at_least(8192, 9000, prompt_param="prompt")
    assert error.param == "prompt"
    assert error.message == (
        "This model's maximum context length is 8192 tokens. However, your prompt resulted in at least 9000 tokens. "
        "Please reduce the length of the prompt."
    )
    error = prompt_limit_exceeded(2048, 2100)
    assert error.param == "prompt"
    assert error.message == (
        "Input tokens exceed the configured limit of 2048 tokens. Your prompt resulted in 2100 tokens. "
        "Please reduce the length of the prompt."
    )


def test_a_prompt_that_fills_the_context_leaves_no_token_for_the_answer() -> None:
    error = context_exceeded(8192, 8192)
    assert "you requested 8193 tokens (8192 in the prompt, 1 in the completion)" in error.message
    assert error.param == "prompt"


def test_the_error_survives_the_wire() -> None:
    error = context_exceeded(64, 60, 5)
    again = error_from_wire(error.to_wire())
    assert type(again) is ContextTooLong
    assert (again.code, again.http_status, again.message) == ("context_length_exceeded", 400, error.message)
