"""`LLM`: text or token ids in, generations out. One object for a script, a notebook, threads and event loops alike.

With one rank the executor runs in this process; a larger tensor-parallel size places a gang of ranks on Ray. Either way
a request goes through the same parts as in the HTTP service: tokenizer, dispatcher, link, executor, detokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tensorweave.cluster.llm_args import gang_mesh
from tensorweave.cluster.quant_config import weight_quantization
from tensorweave.llmapi.base_llm import BaseLLM
from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
from tensorweave.llmapi.inputs import (
    PreprocessedInputs,
    PromptInputs,
    as_batch,
    phases_of,
    read_params,
    read_prompt,
    resolve_params,
)
from tensorweave.llmapi.options import options_per_prompt, refuse_prompt_adapter
from tensorweave.llmapi.outputs import RequestOutput
from tensorweave.llmapi.request_maker import PreparedRequest
from tensorweave.llmapi.request_run import run_request
from tensorweave.llmapi.request_types import (
    KvCacheRetentionConfig,
    LoRARequest,
    PromptAdapterRequest,
    SchedulingParams,
)
from tensorweave.llmapi.sampling_params import SamplingParams
from tensorweave.workers.engine_dir.directory import save_engine_dir


class _TorchLLM(BaseLLM):
    __doc__ = BaseLLM.__doc__

    def generate(
        self,
        inputs: PromptInputs | Sequence[PromptInputs],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest] | None = None,
        prompt_adapter_request: PromptAdapterRequest | Sequence[PromptAdapterRequest] | None = None,
        kv_cache_retention_config: KvCacheRetentionConfig | Sequence[KvCacheRetentionConfig] | None = None,
        disaggregated_params: DisaggregatedParams | Sequence[DisaggregatedParams] | None = None,
        scheduling_params: SchedulingParams | list[SchedulingParams] | None = None,
        cache_salt: str | Sequence[str] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Generate, and wait until all have ended.

        Args:
            inputs: A prompt (text, token ids, or a dict with 'prompt' or 'prompt_token_ids') or a list of prompts.
            sampling_params: One for all, or a list with one for each prompt. Default: greedy, 32 tokens.
            use_tqdm: Show a progress bar for a list.
            lora_request: LoRA adapter: one for all, or a list with one, or None, for each prompt; needs enable_lora.
            prompt_adapter_request: Deprecated, and refused.
            kv_cache_retention_config: How long the prompts' KV is kept afterwards: one for all, or one for each.
            disaggregated_params: Which phase this is, if the two are sent to two LLMs by hand: one for all, or a list
                with one for each prompt.
            scheduling_params: Priority and deadline: one for all, or one for each.
            cache_salt: KV is reused only among requests with the same salt: one for all, or one for each.

        Returns:
            A finished RequestOutput for one prompt; for a list of prompts a list of them, in the same order.

        Raises:
            ValueError: A prompt or a parameter is wrong. Nothing has been started.
        """
        refuse_prompt_adapter(prompt_adapter_request)
        batch, is_single = as_batch(inputs)
        params = resolve_params(sampling_params, batch)
        options = options_per_prompt(
            len(batch),
            kv_cache_retention_config=kv_cache_retention_config,
            disaggregated_params=phases_of(batch) if disaggregated_params is None else disaggregated_params,
            scheduling_params=scheduling_params,
            cache_salt=cache_salt,
            lora_request=lora_request,
        )
        runtime = self._usable_runtime()
        prepared = runtime.maker.make_all(batch, params, options)
        if len(prepared) > 1:
            runtime.engine.expect_requests(sum(len(each.jobs) for each in prepared))
        outputs = [self._start(each) for each in prepared]
        try:
            is_silent = not use_tqdm or is_single or not outputs
            for output in tqdm(outputs, desc="Processed requests", disable=is_silent, leave=True):
                output.result()
        finally:
            for output in outputs:
                if not output.finished:
                    output.abort()
        return outputs[0] if is_single else outputs

    def generate_async(
        self,
        inputs: PromptInputs | PreprocessedInputs,
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        prompt_adapter_request: PromptAdapterRequest | None = None,
        streaming: bool = False,
        kv_cache_retention_config: KvCacheRetentionConfig | None = None,
        disaggregated_params: DisaggregatedParams | None = None,
        scheduling_params: SchedulingParams | None = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        """Start one generation and return at once.

        Args:
            inputs: A prompt: text, token ids, a dict with 'prompt' or 'prompt_token_ids', or a result of `preprocess`.
            sampling_params: Default: what `preprocess` was given, or greedy and 32 tokens.
            lora_request: LoRA adapter; needs enable_lora.
            prompt_adapter_request: Deprecated, and refused.
            streaming: Iterating the result yields tokens as they come; without it, only the finished result.
            kv_cache_retention_config: How long the prompt's KV is kept afterwards.
            disaggregated_params: Which phase this is, if the two are sent to two LLMs by hand.
            scheduling_params: Priority and deadline.
            cache_salt: KV is reused only among requests with the same salt.

        Returns:
            A RequestOutput: call `result(timeout)`, await it, iterate it, or `abort()` it.

        Raises:
            ValueError: The prompt or a parameter is wrong.
        """
        refuse_prompt_adapter(prompt_adapter_request)
        if isinstance(inputs, PreprocessedInputs):
            sampling_params = sampling_params or inputs.sampling_params
            disaggregated_params = disaggregated_params or inputs.disaggregated_params
        [options] = options_per_prompt(
            1,
            kv_cache_retention_config=kv_cache_retention_config,
            disaggregated_params=disaggregated_params,
            scheduling_params=scheduling_params,
            cache_salt=cache_salt,
            lora_request=lora_request,
        )
        params = SamplingParams() if sampling_params is None else sampling_params
        return self._start(self._usable_runtime().maker.make(inputs, params, options, is_streaming=streaming))

    def preprocess(
        self,
        inputs: PromptInputs,
        sampling_params: SamplingParams | None = None,
        disaggregated_params: DisaggregatedParams | None = None,
    ) -> PreprocessedInputs:
        """Tokenize and check a prompt without generating, so that this can be done on another thread or earlier.

        Args:
            inputs: A prompt: text, token ids, or a dict with 'prompt' or 'prompt_token_ids'.
            sampling_params: Says how to tokenize; `generate_async` also uses it if it is given none.
            disaggregated_params: `generate_async` uses it if it is given none.

        Returns:
            What `generate_async` takes as its inputs.

        Raises:
            ValueError: The prompt or a parameter is wrong.
        """
        runtime = self._usable_runtime()
        params = SamplingParams() if sampling_params is None else sampling_params
        read = read_params(params, runtime.tokenizer, runtime.engine.info)
        prompt = read_prompt(inputs, read, runtime.tokenizer)
        return PreprocessedInputs(prompt.text, prompt.token_ids, sampling_params, disaggregated_params)

    def save(self, engine_dir: str | Path) -> None:
        """Write an engine directory: the model, split for these ranks and in this dtype, ready to be loaded as it is.

        Args:
            engine_dir: A new or empty directory; `LLM(model=engine_dir)` loads it with the same tensor_parallel_size.

        Raises:
            ValueError: The directory is not empty, or the model cannot be saved in this form.
        """
        runtime = self._usable_runtime()
        if runtime.args.backend == "_autodeploy":
            raise ValueError("save is for backend 'pytorch' (the default): '_autodeploy' runs checkpoints as they are")
        if runtime.args.pipeline_parallel_size > 1:
            raise ValueError("save is for pipeline_parallel_size 1: engine directories are not divided into stages")
        save_engine_dir(
            runtime.model_dir,
            Path(engine_dir),
            tensor_parallel_size=runtime.args.tensor_parallel_size,
            dtype=runtime.engine.info.dtype,
            quantization=weight_quantization(runtime.args.quant_config),
            moe_expert_parallel_size=gang_mesh(runtime.args).expert,
        )

    def _start(self, prepared: PreparedRequest) -> RequestOutput:
        runtime, output = self._runtime, prepared.output
        future = runtime.loop.submit(run_request(runtime.dispatcher, runtime.engine, prepared))
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        future.add_done_callback(output._note_cancel)
        output._cancel = future.cancel
        return output


class LLM(_TorchLLM):
    __doc__ = BaseLLM.__doc__
