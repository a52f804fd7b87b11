"""From a body's bytes to checked fields and prompts as token ids.

Everything is computed from the bytes, the tokenizer and a `ServedModel`. A body can be made so that this takes seconds,
so `router/bodies/pool.py` runs it in a worker process, except for small bodies.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import orjson

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import Guide
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.router.bodies.served import ServedModel, check_name, check_text
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.openai.chat_form import chat_format, check_form, has_tools_as_text
from tensorweave.router.openai.chat_guide import GuideWriter
from tensorweave.router.openai.chat_request import ChatCompletionRequest
from tensorweave.router.openai.field_types import MAX_LOGPROBS
from tensorweave.router.openai.parsing import check_fields, parse_request
from tensorweave.router.openai.requests import CompletionRequest
from tensorweave.router.sampling.resolution import check_prompt, fit_to_prompt, resolve_sampling
from tensorweave.router.text.chat_template import ChatPrompt
from tensorweave.router.text.choices import Prompt
from tensorweave.router.text.echo import Echo, EchoRequest, read_echo
from tensorweave.router.text.tokens import Tokenizer
from tensorweave.router.text.tools_as_text import with_tools_as_text

AnyRequest = CompletionRequest | ChatCompletionRequest
Api = Literal["completions", "chat", "messages", "responses"]

_MAX_BAD_WORD_TOKENS: Final = 16_384
"""Of all bad words of a request together, in each of their spellings."""
_TOKENS: Final = "i"


@dataclass(frozen=True, slots=True)
class RequestBody:
    """A checked body, its prompts, and for each prompt how its answer is sampled. Seeds are drawn later: without one of
    the client's, a spec has 0.

    Attributes:
        request: The body, or the chat that it was translated to.
        prompts: Their token ids.
        specs: One for each prompt.
        api: Whose body it was.
        repeated: JSON of fields of the body that the answer repeats.
    """

    request: AnyRequest
    prompts: Sequence[Prompt]
    specs: Sequence[SamplingSpec]
    api: Api
    repeated: bytes = b""

    def pack(self) -> list[Any]:
        """As msgpack fields, without what prompts and bad words were made from: that may be the whole body. The specs
        differ only in their lengths."""
        fields = self.request.without_bulk().model_dump_json(exclude_unset=True).encode()
        prompts = [
            [array.array(_TOKENS, prompt.token_ids).tobytes(), prompt.echo and prompt.echo.pack()]
            for prompt in self.prompts
        ]
        lengths = [[spec.max_tokens, spec.min_tokens] for spec in self.specs]
        return [self.api, self.repeated, fields, prompts, [self.specs[0].to_wire(), lengths]]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> RequestBody:
        api, repeated, fields, prompts, (first, lengths) = packed
        known: dict[str, Any] = orjson.loads(fields)
        spec = SamplingSpec.from_wire(first)
        return cls(
            check_fields(CompletionRequest, known)
            if api == "completions"
            else check_fields(ChatCompletionRequest, known),
            [
                Prompt(array.array(_TOKENS, token_ids).tolist(), echo and Echo.unpack(echo))
                for token_ids, echo in prompts
            ],
            [replace(spec, max_tokens=max_tokens, min_tokens=min_tokens) for max_tokens, min_tokens in lengths],
            api,
            repeated,
        )


def read_completion(body: bytes, tokenizer: Tokenizer, served: ServedModel) -> RequestBody:
    """Raises RequestRejected."""
    request = parse_request(CompletionRequest, body)
    check_name(served.model_names, request.model)
    _check_count(served, request, len(request.prompts))
    prompts = [_completion_prompt(tokenizer, served, request, prompt) for prompt in request.prompts]
    specs = _checked_specs(tokenizer, served, request, prompts)
    return RequestBody(request, prompts, specs, "completions")


def read_chat(body: bytes, tokenizer: Tokenizer, served: ServedModel) -> RequestBody:
    """Raises RequestRejected."""
    return read_chat_request(parse_request(ChatCompletionRequest, body), tokenizer, served, "chat")


def read_chat_request(
    request: ChatCompletionRequest, tokenizer: Tokenizer, served: ServedModel, api: Api
) -> RequestBody:
    """Raises RequestRejected."""
    check_name(served.model_names, request.model)
    _check_count(served, request, 1)
    request.check_size_of_tools()
    token_ids = chat_token_ids(request, tokenizer, served)
    prompt = Prompt(_cut(token_ids, request.truncate_prompt_tokens))
    [spec] = _checked_specs(tokenizer, served, request, [prompt])
    form, backend = chat_format(tokenizer, served.chat), served.info.guided_decoding_backend
    check_form(form, request)
    guide = GuideWriter(form, tokenizer, backend, served.guided).write(request, prompt.token_ids, spec.guide)
    return RequestBody(request, [prompt], [replace(spec, guide=guide)], api)


def chat_token_ids(request: ChatCompletionRequest, tokenizer: Tokenizer, served: ServedModel) -> list[int]:
    """The prompt, which may be too long."""
    if request.prompt_token_ids is not None:
        return request.prompt_token_ids
    if request.chat_template is not None and not served.chat.accepts_templates:
        raise RequestRejected(
            "chat_template is not enabled here (security.enable_request_chat_template)", param="chat_template"
        )
    text = tokenizer.render_chat(_chat_prompt(request, tokenizer, served))
    return _encode(text, tokenizer, served, request, add_special_tokens=bool(request.add_special_tokens))


def _chat_prompt(request: ChatCompletionRequest, tokenizer: Tokenizer, served: ServedModel) -> ChatPrompt:
    """With tools as text, where the template leaves them out and the answer is read in that text's form. Otherwise,
    calls that it would leave out of the prompt without a word are refused."""
    if request.chat_template is not None or tokenizer.written_of_tools.calls:
        return request.chat_prompt
    if has_tools_as_text(chat_format(tokenizer, served.chat), tokenizer):
        return with_tools_as_text(request.chat_prompt)
    places = [place for place, message in enumerate(request.messages) if message.calls]
    if places:
        param = f"messages[{places[0]}].tool_calls"
        raise RequestRejected(f"{param}: the model's chat template does not write calls of tools", param=param)
    return request.chat_prompt


def _completion_prompt(
    tokenizer: Tokenizer, served: ServedModel, request: CompletionRequest, prompt: str | list[int]
) -> Prompt:
    token_ids, add_special_tokens = prompt, request.add_special_tokens is not False
    if isinstance(token_ids, str):
        token_ids = _encode(token_ids, tokenizer, served, request, add_special_tokens=add_special_tokens)
    cut = _cut(token_ids, request.truncate_prompt_tokens)
    if not request.echo:
        return Prompt(cut)
    check_prompt(cut, served.info)
    echo = EchoRequest(
        cut,
        prompt if isinstance(prompt, str) and len(cut) == len(token_ids) else None,
        num_added=tokenizer.num_added_tokens if add_special_tokens else (0, 0),
        has_tokens=request.telling.num_logprobs is not None,
        is_all=not request.telling.has_output,
    )
    return Prompt(cut, read_echo(tokenizer, echo))


def _encode(
    text: str, tokenizer: Tokenizer, served: ServedModel, request: AnyRequest, *, add_special_tokens: bool
) -> list[int]:
    if request.truncate_prompt_tokens is None:
        check_text(text, tokenizer, served, param=request.prompt_param)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _cut(token_ids: list[int], num_kept: int | None) -> list[int]:
    return token_ids if num_kept is None else token_ids[-num_kept:]


def _checked_specs(
    tokenizer: Tokenizer, served: ServedModel, request: AnyRequest, prompts: Sequence[Prompt]
) -> list[SamplingSpec]:
    """Everything that planning refuses is refused here: what comes through is no longer than the model's context."""
    for prompt in prompts:
        check_prompt(prompt.token_ids, served.info, param=request.prompt_param)
    words = _bad_words(tokenizer, request)
    try:
        return _resolve_sampling(request, prompts, words, served)
    except RequestRejected as error:
        if error.param is None or (name := request.field_names.get(error.param)) is None:
            raise
        raise type(error)(error.message.replace(error.param, name), param=name) from None


def _bad_words(tokenizer: Tokenizer, request: AnyRequest) -> list[list[int]]:
    words = [ids for word in request.bad_words or () for ids in tokenizer.word_ids(word)]
    if (num_tokens := sum(map(len, words))) > _MAX_BAD_WORD_TOKENS:
        raise RequestRejected(
            f"bad_words have {num_tokens} tokens in all; the limit is {_MAX_BAD_WORD_TOKENS}", param="bad_words"
        )
    return words


def _resolve_sampling(
    request: AnyRequest, prompts: Sequence[Prompt], bad_words: Sequence[Sequence[int]], served: ServedModel
) -> list[SamplingSpec]:
    fields, info = request.sampling(request.telling, bad_words), served.info
    spec = resolve_sampling(
        fields,
        info,
        default_max_tokens=request.DEFAULT_MAX_TOKENS,
        max_logprobs=MAX_LOGPROBS,
        draw_seed=lambda num_bits: 0,
    )
    spec = replace(spec, guide=_guide(request, served))
    return [
        fit_to_prompt(
            spec,
            len(prompt.token_ids),
            info,
            asked_tokens=fields.max_tokens,
            caps_max_tokens=True,
            prompt_param=request.prompt_param,
        )
        for prompt in prompts
    ]


def _guide(request: AnyRequest, served: ServedModel) -> Guide | None:
    if (asked := request.guide_params) is None:
        return None
    params, param = asked
    request.check_may_end(param)
    backend = served.info.guided_decoding_backend
    return guide_for(params, backend, served.guided, param=param, may_be_grammar=True)


def _check_count(served: ServedModel, request: AnyRequest, num_prompts: int) -> None:
    wanted, limit = num_prompts * request.num_sequences, served.max_sequences
    if wanted > limit:
        name = "prompt" if num_prompts > 1 else "n" if request.num_sequences == request.n else "best_of"
        raise RequestRejected(f"the request asks for {wanted} sequences; the limit is {limit}", param=name)
