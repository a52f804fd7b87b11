"""The error of a request that does not fit in the model's context, in OpenAI's own words: litellm, aider and others
know it by them and by its code, and then shorten the conversation.

The router and the executors refuse with it; it crosses the wire between them.
"""

from __future__ import annotations

from tensorweave.cluster.errors import ContextTooLong


def context_exceeded(
    max_seq_len: int, num_prompt: int, num_output: int | None = None, *, prompt_param: str = "prompt"
) -> ContextTooLong:
    """For a prompt whose tokens were counted.

    Args:
        max_seq_len: Tokens of the model's context.
        num_prompt: Tokens of the prompt.
        num_output: Tokens that the request wants after it, if it says so.
        prompt_param: The field that holds the prompt. It is the error's `param` where the prompt leaves no room;
            otherwise that is max_tokens.
    """
    if num_output is None and num_prompt > max_seq_len:
        return ContextTooLong(_resulted_in(max_seq_len, str(num_prompt), prompt_param), param=prompt_param)
    noun, num_output = _noun(prompt_param), num_output or 1
    message = (
        f"{_limit(max_seq_len)} However, you requested {num_prompt + num_output} tokens ({num_prompt} in the {noun}, "
        f"{num_output} in the completion). Please reduce the length of the {noun} or completion."
    )
    if num_prompt >= max_seq_len:
        return ContextTooLong(message, param=prompt_param)
    return ContextTooLong(f"{message} max_tokens may be at most {max_seq_len - num_prompt}.", param="max_tokens")


def context_exceeded_by_at_least(
    max_seq_len: int, min_num_prompt: int, *, prompt_param: str = "prompt"
) -> ContextTooLong:
    """For a prompt that was not tokenized, because it has at least `min_num_prompt` tokens."""
    message = _resulted_in(max_seq_len, f"at least {min_num_prompt}", prompt_param)
    return ContextTooLong(message, param=prompt_param)


def prompt_limit_exceeded(limit: int, num_prompt: int) -> ContextTooLong:
    """For a prompt that the context has room for, but not the server, which computes a prompt in one step."""
    message = (
        f"Input tokens exceed the configured limit of {limit} tokens. Your prompt resulted in {num_prompt} tokens. "
        "Please reduce the length of the prompt."
    )
    return ContextTooLong(message, param="prompt")


def input_exceeds_context(limit: int, num_input: int) -> ContextTooLong:
    """For an input of /v1/embeddings."""
    message = (
        f"{_limit(limit)} However, your input resulted in {num_input} tokens. Please reduce the length of the input."
    )
    return ContextTooLong(message, param="input")


def _resulted_in(max_seq_len: int, num_prompt: str, prompt_param: str) -> str:
    noun = _noun(prompt_param)
    return (
        f"{_limit(max_seq_len)} However, your {noun} resulted in {num_prompt} tokens. "
        f"Please reduce the length of the {noun}."
    )


def _limit(max_seq_len: int) -> str:
    return f"This model's maximum context length is {max_seq_len} tokens."


def _noun(prompt_param: str) -> str:
    return "prompt" if prompt_param == "prompt" else "messages"
