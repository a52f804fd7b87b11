"""`LLM`: text or token ids in, generations out. One object for a script, a notebook, threads and event loops alike.

At one rank the executor runs in this process; a larger tensor-parallel size places a gang of ranks on Ray. Either way
requests take the road of the HTTP service: tokenizer, dispatcher, link, executor, detokenizer.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import uuid
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import pydantic
from tqdm import tqdm

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.protocol import GenerateRequest
from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
from tensorweave.llmapi.engine import Engine, open_engine
from tensorweave.llmapi.inputs import PromptInputs, as_batch, read_prompt, resolve_params
from tensorweave.llmapi.loop_thread import LoopThread
from tensorweave.llmapi.outputs import RequestOutput, Update
from tensorweave.llmapi.phases import as_phase, resolve_phases, run_context_phase
from tensorweave.llmapi.sampling_params import SamplingParams
from tensorweave.llmapi.status import set_api_status
from tensorweave.router.admission import Limits
from tensorweave.router.detokenize import IncrementalDetokenizer
from tensorweave.router.dispatch import Dispatcher
from tensorweave.router.generation import Job, TokensOnly, generate_text
from tensorweave.router.tokens import Tokenizer
from tensorweave.workers.model_store import resolve_model
from tensorweave.workers.models.config import load_model_config

# The LLM class queues without bound what a caller hands it; deadlines are the caller's.
_LIMITS = Limits(max_inflight=1 << 30, max_queued=1 << 30, default_deadline_s=None, ready_timeout_s=60.0)


class _TorchLLM:
    """A large language model, ready to generate.

    Works from threads and from event loops, and after an error of one request. Close it with `shutdown` or as a context
    manager.

    Args:
        model: A Hugging Face model directory, a hub id, or `smollm2-135m-instruct`.
        tokenizer: Directory, hub id or tokenizer instance; default: the model's own.
        tokenizer_mode: 'auto' prefers the fast tokenizer; 'slow' forces the Python one.
        skip_tokenizer_init: Load no tokenizer; prompts are token ids and outputs have no text.
        trust_remote_code: Allow a tokenizer's own code from its repository.
        tensor_parallel_size: Ranks that share each layer; above 1 they run on Ray, which is started or joined.
        dtype: 'auto', 'float16', 'bfloat16' or 'float32'.
        revision: Branch, tag or commit of a hub model.
        tokenizer_revision: Branch, tag or commit of a hub tokenizer.
        backend: 'pytorch' (the default); others are refused with what to use instead.
        kwargs: Any other field of `LlmArgs`.

    Attributes:
        tokenizer: The tokenizer instance, or None with skip_tokenizer_init.
        disaggregated_params: Where and as what other instances get KV computed here; empty without a
            `cache_transceiver_config`.
        llm_id: Identifies this instance in logs.

    Raises:
        ValueError: An argument is wrong or unknown (the nearest known name is given), or the model's files are.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: Literal["auto", "slow"] = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        backend: Literal["tensorrt", "pytorch", "_autodeploy"] | None = None,
        **kwargs: Any,
    ) -> None:
        named = {
            "model": model,
            "tokenizer": tokenizer,
            "tokenizer_mode": tokenizer_mode,
            "skip_tokenizer_init": skip_tokenizer_init,
            "trust_remote_code": trust_remote_code,
            "tensor_parallel_size": tensor_parallel_size,
            "dtype": dtype,
            "revision": revision,
            "tokenizer_revision": tokenizer_revision,
            "backend": backend,
        }
        self.llm_id = f"llm-{uuid.uuid4().hex[:12]}"
        self.args = _parse(named | kwargs)
        load_model_config(resolve_model(model, revision=revision))  # a wrong model is named before anything is loaded
        self._tokenizer = None if skip_tokenizer_init else _load_tokenizer(self.args)
        self._numbers = itertools.count()
        self._loop = LoopThread(f"{self.llm_id}-loop")
        try:
            self._engine: Engine = open_engine(self.args, self._loop)
        except BaseException:
            self._loop.close()
            raise
        self._dispatcher = self._loop.call(_make_dispatcher(self._engine))
        self._running: set[concurrent.futures.Future[None]] = set()
        self._finalizer = weakref.finalize(self, _close, self._engine, self._loop, self._running)

    @property
    def tokenizer(self) -> Any:
        return None if self._tokenizer is None else self._tokenizer.backend

    @property
    @set_api_status("prototype")
    def disaggregated_params(self) -> dict[str, Any]:
        """`backend`, `endpoints` (one a rank, "host:port") and `fingerprint` (what the other side must have alike)."""
        source = self._engine.kv_source
        transceiver = self.args.cache_transceiver_config
        if source is None or transceiver is None:
            return {}
        return {
            "backend": transceiver.backend,
            "endpoints": [f"{end.host}:{end.port}" for end in source.endpoints],
            "fingerprint": dict(source.fingerprint),
        }

    def generate(
        self,
        inputs: PromptInputs | Sequence[PromptInputs],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        disaggregated_params: DisaggregatedParams | Sequence[DisaggregatedParams] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Generate and wait for all.

        Args:
            inputs: A prompt (text, token ids, or a dict with 'prompt' or 'prompt_token_ids') or a list of prompts.
            sampling_params: One for all, or a list with one for each prompt. Default: greedy, 32 tokens.
            use_tqdm: Show a progress bar for a list.
            disaggregated_params: Which phase this is, where the two are sent to two LLMs by hand: one for all, or a
                list with one for each prompt.

        Returns:
            A finished RequestOutput for one prompt, a list of them in the prompts' order for a list.

        Raises:
            ValueError: A prompt or a sampling parameter is wrong; nothing has been started.
        """
        batch, is_single = as_batch(inputs)
        params = resolve_params(sampling_params, len(batch))
        phases = resolve_phases(disaggregated_params, len(batch))
        prepared = [self._prepare(*each) for each in zip(batch, params, phases, strict=True)]
        outputs = [self._start(output, job) for output, job in prepared]
        try:
            for output in tqdm(outputs, desc="Processed requests", disable=not use_tqdm or is_single, leave=True):
                output.result()
        finally:
            for output in outputs:
                if not output.finished:
                    output.abort()
        return outputs[0] if is_single else outputs

    def generate_async(
        self,
        inputs: PromptInputs,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        disaggregated_params: DisaggregatedParams | None = None,
    ) -> RequestOutput:
        """Start one generation and return at once.

        Args:
            inputs: A prompt: text, token ids, or a dict with 'prompt' or 'prompt_token_ids'.
            sampling_params: Default: greedy, 32 tokens.
            streaming: Iterate the result to see tokens as they come; without it an iteration gives the finished result
                only.
            disaggregated_params: Which phase this is, where the two are sent to two LLMs by hand.

        Returns:
            A RequestOutput: call `result(timeout)`, await it, iterate it, or `abort()` it.

        Raises:
            ValueError: The prompt or a sampling parameter is wrong.
        """
        params = sampling_params or SamplingParams()
        output, job = self._prepare(inputs, params, disaggregated_params, streaming=streaming)
        return self._start(output, job)

    @set_api_status("beta")
    def get_stats(self, timeout: float = 2.0) -> list[dict[str, Any]]:
        """Statistics of the engine's steps since the last call, oldest first.

        Args:
            timeout: Longest wait for them, in seconds.

        Returns:
            One dict a step with TensorRT-LLM's keys (`iter`, `gpuMemUsage` in MB, `kvCacheStats`,
            `inflightBatchingStats`, …).
        """
        return self._engine.stats(timeout)

    @set_api_status("beta")
    def shutdown(self) -> None:
        """End running requests, free the model and stop what this object started. Calling it again does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __getstate__(self) -> object:
        raise RuntimeError("an LLM object cannot be pickled; create it where it runs")

    # ---- one request

    def _prepare(
        self,
        inputs: PromptInputs,
        params: SamplingParams,
        phase: DisaggregatedParams | None,
        *,
        streaming: bool = False,
    ) -> tuple[RequestOutput, Job]:
        if not self._finalizer.alive:
            raise RuntimeError("this LLM has been shut down")
        prompt = read_prompt(inputs, params, self._tokenizer, self._engine.info)
        request_id = f"{self.llm_id}-{next(self._numbers)}"
        request = GenerateRequest(request_id, prompt.token_ids, prompt.sampling)
        first_tokens: Sequence[int] = ()
        if phase is not None:
            request, first_tokens = as_phase(request, phase, self._engine.info, self._engine.kv_source is not None)
        detokenizer: IncrementalDetokenizer | TokensOnly = TokensOnly()
        if self._tokenizer is not None and params.detokenize:
            detokenizer = IncrementalDetokenizer(
                self._tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                stop=prompt.stop,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=prompt.sampling.min_tokens,
            )
        end_ids = frozenset(prompt.end_ids)
        output = RequestOutput(request.request_id, prompt.text, list(prompt.token_ids), is_streaming=streaming)
        return output, Job(0, request, detokenizer, end_ids, first_tokens=first_tokens)

    def _start(self, output: RequestOutput, job: Job) -> RequestOutput:
        future = self._loop.submit(_drive(self._dispatcher, job, output))
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        future.add_done_callback(output._note_cancel)
        output._cancel = future.cancel
        return output


class LLM(_TorchLLM):
    __doc__ = _TorchLLM.__doc__


def _parse(values: Mapping[str, Any]) -> TorchLlmArgs:
    try:
        return TorchLlmArgs(**values)
    except pydantic.ValidationError as error:
        raise ValueError("; ".join(_sentence(item) for item in error.errors())) from None


def _sentence(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message} (given: {item['input']!r})" if name else message


def _load_tokenizer(args: TorchLlmArgs) -> Tokenizer:
    source = resolve_model(args.model, revision=args.revision) if args.tokenizer is None else args.tokenizer
    try:
        return Tokenizer.load(
            source,
            tokenizer_mode=args.tokenizer_mode,
            revision=args.tokenizer_revision,
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no tokenizer can be loaded from {source} ({reason}); see skip_tokenizer_init") from error


async def _make_dispatcher(engine: Engine) -> Dispatcher:
    return Dispatcher(engine.fleet, limits=_LIMITS)


async def _drive(dispatcher: Dispatcher, job: Job, output: RequestOutput) -> None:
    """Run one request to its end on the LLM's event loop, telling its output everything."""
    try:
        if job.request.offer is not None:
            output._push(await run_context_phase(dispatcher, job))
            return
        async for delta in generate_text(dispatcher, job):
            output._push(
                Update(
                    delta.index,
                    delta.text,
                    delta.token_ids,
                    delta.finish_reason,
                    delta.stop_reason,
                    delta.num_cached_tokens,
                )
            )
    except TensorweaveError as error:
        output._push(Update(error=error))
    except Exception as error:  # the request's boundary: whoever waits for the output must hear of it
        output._push(Update(error=error))


def _close(engine: Engine, loop: LoopThread, running: set[concurrent.futures.Future[None]]) -> None:
    for future in tuple(running):
        future.cancel()
    try:
        engine.close()
    finally:
        loop.close()
