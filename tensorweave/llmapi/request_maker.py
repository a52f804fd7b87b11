"""`RequestMaker`: from a prompt and its parameters to jobs for the dispatcher and the output that they fill.

Everything is checked here, before anything is started. What is wrong is a ValueError.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tensorweave.cluster.llm_args import TorchLlmArgs, adapter_config
from tensorweave.cluster.protocol import Adapter, GenerateRequest
from tensorweave.llmapi.completion_output import OutputOptions
from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
from tensorweave.llmapi.engine import Engine
from tensorweave.llmapi.inputs import (
    PreprocessedInputs,
    PromptInputs,
    ReadParams,
    ReadPrompt,
    read_params,
    read_prompt,
)
from tensorweave.llmapi.options import RequestOptions
from tensorweave.llmapi.outputs import RequestOutput
from tensorweave.llmapi.phases import as_phase
from tensorweave.llmapi.request_types import LoRARequest
from tensorweave.llmapi.sampling_fields import (
    LogitsProcessor,
    logits_processors,
    num_sequences,
    ranks_sequences,
)
from tensorweave.llmapi.sampling_params import SamplingParams
from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.chat_formats.choice import choose_format
from tensorweave.router.sampling.resolution import nth_seed
from tensorweave.router.text.detokenize import IncrementalDetokenizer
from tensorweave.router.text.generation import Job, TokensOnly
from tensorweave.router.text.tokens import Tokenizer
from tensorweave.workers.lora.peft_directory import DigestCache

_TAIL_TOKENS: Final = 8192
_TOKENS_PER_CHUNK: Final = 32
_TOKENS_PER_CHUNK_WITH_STOP: Final = 4
"""Of an answer that is not streamed. A chunk costs about 20 µs of this process, in which the engine's steps run too: 9
ms a step for 512 requests if each token were one. The engine goes on until a stop string is found."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that is ready to run. Outputs begin with `echo_text` and `echo_ids`, the prompt's, which are not
    generated. The executor holds `processors`, by name, while the request runs."""

    output: RequestOutput
    jobs: Sequence[Job]
    processors: Mapping[str, LogitsProcessor] = field(default_factory=dict)
    echo_text: str = ""
    echo_ids: Sequence[int] = ()


class RequestMaker:
    """Used from any thread."""

    def __init__(self, llm_id: str, args: TorchLlmArgs, tokenizer: Tokenizer | None, engine: Engine) -> None:
        self._llm_id = llm_id
        self._args = args
        self._tokenizer = tokenizer
        self._engine = engine
        self._numbers = itertools.count()
        self._digests = DigestCache()
        self._reasoning: ChatFormat | None = None
        if args.reasoning_parser is not None:
            self._reasoning = choose_format(None, reasoning_parser=args.reasoning_parser)

    def make(
        self,
        inputs: PromptInputs | PreprocessedInputs,
        params: SamplingParams,
        options: RequestOptions,
        *,
        is_streaming: bool = False,
    ) -> PreparedRequest:
        return self._make(inputs, params, options, {}, is_streaming=is_streaming)

    def make_all(
        self,
        batch: Sequence[PromptInputs | PreprocessedInputs],
        params: Sequence[SamplingParams],
        options: Sequence[RequestOptions],
    ) -> list[PreparedRequest]:
        """One for each prompt. Parameters that several prompts share are read once."""
        known: dict[int, ReadParams] = {}
        return [self._make(*each, known, is_streaming=False) for each in zip(batch, params, options, strict=True)]

    def _make(
        self,
        inputs: PromptInputs | PreprocessedInputs,
        params: SamplingParams,
        options: RequestOptions,
        known: dict[int, ReadParams],
        *,
        is_streaming: bool,
    ) -> PreparedRequest:
        number = next(self._numbers)
        request_id = f"{self._llm_id}-{number}"
        read, processors = self._read_params(params, request_id, known)
        prompt, params = self._with_reasoning(read_prompt(inputs, read, self._tokenizer)), read.params
        self._check_engine(params, is_streaming)
        count, phase = num_sequences(params), options.disaggregated_params
        num_held = 1 if is_streaming else _TOKENS_PER_CHUNK_WITH_STOP if prompt.stop else _TOKENS_PER_CHUNK
        request = GenerateRequest(request_id, prompt.token_ids, prompt.sampling, answer_every=num_held)
        request = dataclasses.replace(options.apply_to(request), adapter=self._adapter(options.lora_request))
        first_tokens: Sequence[int] = ()
        if phase is not None:
            request, first_tokens = self._as_phase(request, phase, count)
        output = RequestOutput(
            number if phase is None or phase.disagg_request_id is None else phase.disagg_request_id,
            prompt.text,
            list(prompt.token_ids),
            num_sequences=count,
            num_returned=params.n,
            options=self._output_options(params, prompt),
            is_streaming=is_streaming,
            unique_id=request.request_id,
        )
        detokenizers = self._detokenizers(params, prompt, count)
        end_ids = frozenset() if params.ignore_eos else frozenset(prompt.end_ids)  # else asked for by stop_token_ids
        jobs = [
            Job(index, _nth(request, index), detokenizer, end_ids, first_tokens=first_tokens)
            for index, detokenizer in enumerate(detokenizers)
        ]
        if params.exclude_input_from_output:
            return PreparedRequest(output, jobs, processors)
        return PreparedRequest(output, jobs, processors, self._prompt_text(params, prompt), prompt.token_ids)

    def _adapter(self, asked: LoRARequest | None) -> Adapter | None:
        """What its directory holds now."""
        if asked is None:
            return None
        if adapter_config(self._args) is None:
            raise ValueError("lora_request needs an LLM that was made with enable_lora=True")
        if not asked.lora_path:
            raise ValueError(f"the lora_request {asked.lora_name!r} has no lora_path")
        return self._digests.find(asked.lora_name, str(Path(asked.lora_path).resolve()))

    def _with_reasoning(self, prompt: ReadPrompt) -> ReadPrompt:
        """Where the model's form of reasoning is named, the form of an output is that of the text after it."""
        guide = prompt.sampling.guide
        if guide is None or self._reasoning is None or self._tokenizer is None:
            return prompt
        tail = self._tokenizer.decode(prompt.token_ids[-_TAIL_TOKENS:], skip_special_tokens=False)
        guide = self._reasoning.guide(answer_guide=guide, prompt_tail=tail)
        return dataclasses.replace(prompt, sampling=dataclasses.replace(prompt.sampling, guide=guide))

    def _read_params(
        self, params: SamplingParams, request_id: str, known: dict[int, ReadParams]
    ) -> tuple[ReadParams, dict[str, LogitsProcessor]]:
        """Also the logits processors by the names that this request's have. `known` has the parameters read before, by
        their identity."""
        callables = logits_processors(params) if isinstance(params, SamplingParams) else []
        processors = {f"{request_id}.{place}": processor for place, processor in enumerate(callables)}
        read = known.get(id(params))
        if read is None or processors:
            read = known[id(params)] = read_params(params, self._tokenizer, self._engine.info, list(processors))
        return read, processors

    def _as_phase(
        self, request: GenerateRequest, phase: DisaggregatedParams, num_sequences: int
    ) -> tuple[GenerateRequest, Sequence[int]]:
        phased = as_phase(request, phase, self._engine.info, gives_kv=self._engine.kv_source is not None)
        if num_sequences > 1 and (phase.is_context_only or phase.is_generation_only):
            raise ValueError(f"n and best_of must be 1 in a {phase.request_type} request")
        return phased

    def _check_engine(self, params: SamplingParams, is_streaming: bool) -> None:
        if params.apply_batched_logits_processor and self._args.batched_logits_processor is None:
            raise ValueError("apply_batched_logits_processor needs an LLM that was given a batched_logits_processor")
        if is_streaming and ranks_sequences(params):
            raise ValueError(
                f"best_of {params.best_of} above n {params.n} cannot be streamed: the best are known only at the end"
            )

    def _output_options(self, params: SamplingParams, prompt: ReadPrompt) -> OutputOptions:
        return OutputOptions(
            logprobs=params.logprobs is not None,
            perf_metrics=params.return_perf_metrics or self._args.return_perf_metrics,
            vocab_size=self._engine.info.vocab_size,
            num_echoed=0 if params.exclude_input_from_output else len(prompt.token_ids),
        )

    def _detokenizers(
        self, params: SamplingParams, prompt: ReadPrompt, count: int
    ) -> Sequence[IncrementalDetokenizer | TokensOnly]:
        tokenizer = self._tokenizer
        if tokenizer is None or not params.detokenize:
            return [TokensOnly()] * count
        context = tokenizer.left_context(prompt.token_ids, skip_special_tokens=params.skip_special_tokens)
        return [
            IncrementalDetokenizer(
                tokenizer,
                context,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                stop=prompt.stop,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=prompt.sampling.min_tokens,
            )
            for _ in range(count)
        ]

    def _prompt_text(self, params: SamplingParams, prompt: ReadPrompt) -> str:
        """The prompt's text, for an output that begins with it. If its last character is incomplete, that character
        comes with the answer."""
        if self._tokenizer is None or not params.detokenize:
            return ""
        assembler = self._tokenizer.assembler(
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        return assembler.add(prompt.token_ids)


def _nth(request: GenerateRequest, index: int) -> GenerateRequest:
    """Of several sequences only the first reports on the prompt, so that the others can use cached KV."""
    if index == 0:
        return request
    sampling = dataclasses.replace(
        request.sampling,
        seed=nth_seed(request.sampling.seed, index),
        num_prompt_logprobs=None,
        wants_context_logits=False,
    )
    return dataclasses.replace(request, request_id=f"{request.request_id}-{index}", sampling=sampling)
