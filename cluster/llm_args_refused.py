"""Arguments of TensorRT-LLM that are known here and not supported: what to say of each, and the values that ask for
nothing which is not so anyway. Those pass; every other one is refused by `cluster.strict_model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Refusal:
    """`advice` says what to do instead, `neutral` which values ask for nothing."""

    advice: str
    neutral: tuple[Any, ...] = (None,)

    def allows(self, value: object) -> bool:
        return any(value is each or (type(value) is type(each) and value == each) for each in self.neutral)


def _off(advice: str) -> Refusal:
    return Refusal(advice, (None, False))


_ONE_RANK: Final = "ranks divide layers only; use tensor_parallel_size or pipeline_parallel_size"
_ONE_STEP: Final = "a step starts as soon as there is work"

LLM_ARGS: Final[Mapping[str, Refusal]] = {
    "context_parallel_size": Refusal(_ONE_RANK, (None, 1)),
    "cp_config": Refusal(_ONE_RANK),
    "gpus_per_node": Refusal("Ray knows how many GPUs each node has"),
    "enable_attention_dp": _off("gangs have no data-parallel ranks"),
    "enable_lm_head_tp_in_adp": _off("gangs have no data-parallel ranks"),
    "attention_dp_config": Refusal("gangs have no data-parallel ranks"),
    "moe_cluster_parallel_size": Refusal("use moe_tensor_parallel_size and moe_expert_parallel_size", (None, 1)),
    "peft_cache_config": Refusal("lora_config.max_cpu_loras bounds the adapters in memory"),
    "enable_prompt_adapter": _off("put the prompt's text or token ids into inputs"),
    "decoding_config": Refusal("use speculative_config"),
    "max_beam_width": Refusal("use SamplingParams.n and best_of with a temperature", (None, 1)),
    "max_input_len": Refusal("max_seq_len bounds prompt and output together"),
    "stream_interval": Refusal("every step's tokens are streamed", (None, 1)),
    "request_stats_max_iterations": Refusal("get_stats tells of steps, SamplingParams.return_perf_metrics of requests"),
    "enable_iter_req_stats": _off("get_stats tells of steps, SamplingParams.return_perf_metrics of requests"),
    "perf_metrics_max_requests": Refusal("each output carries its own request_perf_metrics", (None, 0)),
    "gather_generation_logits": Refusal("SamplingParams.return_generation_logits asks for them", (None, False, True)),
    "num_postprocess_workers": Refusal("text is made on the event loop; over HTTP use router.replicas", (None, 0)),
    "postprocess_tokenizer_dir": Refusal("there are no postprocess workers"),
    "fail_fast_on_attention_window_too_large": _off("the KV cache keeps whole prompts, whatever the window"),
    "build_config": Refusal("nothing is built; LLM.save makes an engine directory"),
    "checkpoint_loader": Refusal("safetensors in Hugging Face's layout are what is read"),
    "checkpoint_format": Refusal("safetensors in Hugging Face's layout are what is read", (None, "HF")),
    "mm_encoder_only": _off("there are no multimodal models here"),
    "sampler_type": Refusal("there is one sampler", (None, "auto")),
    "batch_wait_timeout_ms": Refusal(_ONE_STEP, (None, 0, 0.0)),
    "batch_wait_timeout_iters": Refusal(_ONE_STEP, (None, 0)),
    "batch_wait_max_tokens_ratio": Refusal(_ONE_STEP, (None, 0, 0.0)),
    "print_iter_log": _off("get_stats tells of every step"),
    "torch_compile_config": Refusal("our kernels are fused already; torch.compile is not used"),
    "enable_autotuner": _off("kernels have fixed tilings, so that every gang computes the same tokens"),
    "enable_layerwise_nvtx_marker": _off("py-spy and torch's profiler see the ranks"),
    "enable_min_latency": _off("there is one engine for all loads"),
    "force_dynamic_quantization": _off("inputs of quantized weights are always quantized per token; see quant_config"),
    "calib_config": Refusal("scales are found while loading; nothing is calibrated"),
    "kv_connector_config": Refusal("cache_transceiver_config exchanges KV between gangs"),
    "orchestrator_type": Refusal("ranks run on Ray", (None, "ray")),
    "sparse_attention_config": Refusal("attention is dense"),
    "ray_worker_extension_cls": Refusal("'scheduler' and 'kv_cache_manager' take classes of your own"),
}

KV_CACHE: Final[Mapping[str, Refusal]] = {
    "max_attention_window": Refusal("the model's own windows are used"),
    "sink_token_length": Refusal("attention has no sinks", (None, 0)),
    "host_cache_size": Refusal("there is one cache level", (None, 0)),
    "cross_kv_cache_fraction": Refusal("there are no encoder models here"),
    "secondary_offload_min_priority": Refusal("there is one cache level"),
    "attention_dp_events_gather_period_ms": Refusal("gangs have no data-parallel ranks"),
    "copy_on_partial_reuse": Refusal("a partly matching block is always copied", (None, True)),
    "use_uvm": _off("the cache is in the device's own memory"),
    "max_gpu_total_bytes": Refusal("max_tokens bounds the cache", (None, 0)),
    "iteration_stats_interval": Refusal("every step is recorded", (None, 1)),
}

LORA: Final[Mapping[str, Refusal]] = {
    "lora_dir": Refusal("each LoRARequest names its directory, and a service's adapters theirs", (None, [])),
    "lora_ckpt_source": Refusal("adapters are PEFT directories", (None, "hf")),
    "trtllm_modules_to_hf_modules": Refusal("modules have the checkpoint's names", (None, {})),
    "swap_gate_up_proj_lora_b_weight": Refusal("gate and up have the checkpoint's order"),
}

_OTHER_ALGORITHMS: Final = "it belongs to algorithms that are not here"

QUANT: Final[Mapping[str, Refusal]] = {
    "smoothquant_val": Refusal(_OTHER_ALGORITHMS, (None, 0.5)),
    "clamp_val": Refusal("the largest number of each row or channel has the scale"),
    "use_meta_recipe": _off("every layer is quantized alike"),
    "pre_quant_scale": _off(_OTHER_ALGORITHMS),
    "exclude_modules": Refusal("all matrices of the layers are quantized"),
    "mamba_ssm_cache_dtype": Refusal("there are no state-space models here"),
}

MOE: Final[Mapping[str, Refusal]] = {
    "max_num_tokens": Refusal("experts take the tokens of a step in pieces that bound their memory"),
    "load_balancer": Refusal("each expert is on the ranks of one group"),
    "disable_finalize_fusion": _off("there is one way in which experts are added"),
    "use_low_precision_moe_combine": _off("experts are added in float32"),
}

SCHEDULER: Final[Mapping[str, Refusal]] = {
    "dynamic_batch_config": Refusal("max_batch_size and max_num_tokens bound a step"),
    "waiting_queue_policy": Refusal("SchedulingParams.priority decides, then the order of arrival"),
}

CACHE_TRANSCEIVER: Final[Mapping[str, Refusal]] = {
    "max_tokens_in_buffer": Refusal("KV goes from the cache itself, through no buffer of its own"),
    "kv_transfer_sender_future_timeout_ms": Refusal("kv_lease_timeout_ms bounds what a sender keeps"),
    "kv_transfer_poll_interval_ms": Refusal("nothing is polled"),
    "transceiver_runtime": Refusal("there is one", (None, "auto")),
}

_NO_DRAFT_MODEL: Final = "drafts are made without a model, by 'NGram' or a drafter of your own"

SPECULATION: Final[Mapping[str, Refusal]] = {
    "speculative_model": Refusal(_NO_DRAFT_MODEL),
    "speculative_model_dir": Refusal(_NO_DRAFT_MODEL),
    "load_format": Refusal(_NO_DRAFT_MODEL),
    "draft_len_schedule": Refusal("draft lengths follow from how many drafts were accepted"),
}
