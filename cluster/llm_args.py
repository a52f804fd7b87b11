"""`TorchLlmArgs`: the one place for engine knobs.

The LLM class, YAML files and the command line all end here, and ranks receive exactly this. Unknown keys are refused
with the nearest known name; there are no environment variables behind any knob.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import field_validator, model_validator

from tensorweave.cluster.cache_transceiver_config import CacheTransceiverConfig
from tensorweave.cluster.cuda_graph_config import CudaGraphConfig
from tensorweave.cluster.kv_cache_config import KvCacheConfig
from tensorweave.cluster.llm_args_refused import LLM_ARGS, Refusal
from tensorweave.cluster.lora_config import LoraConfig
from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.moe_config import MoeConfig, expert_groups
from tensorweave.cluster.quant_config import QuantConfig, weight_quantization
from tensorweave.cluster.scheduler_config import SchedulerConfig
from tensorweave.cluster.speculation_config import NGramDecodingConfig, UserProvidedDecodingConfig, check_decoding_type
from tensorweave.cluster.strict_model import Field, StrictBaseModel

_ALLREDUCE_STRATEGIES: Final = ("AUTO", "NCCL", "ONESHOT")


class TorchLlmArgs(StrictBaseModel):
    """Every constructor argument of `LLM`. Fields without a status are committed."""

    refused: ClassVar[Mapping[str, Refusal]] = LLM_ARGS

    model: str | Path = Field(description="A Hugging Face model directory, GGUF file, hub id, or engine directory.")
    tokenizer: Any = Field(None, description="Directory, hub id or tokenizer instance. Default: the model's own.")
    tokenizer_mode: Literal["auto", "slow"] = Field(
        "auto", description="'auto' prefers the fast tokenizer; 'slow' goes through transformers' Python code."
    )
    skip_tokenizer_init: bool = Field(
        False, description="Load no tokenizer; prompts are token ids and outputs have no text."
    )
    trust_remote_code: bool = Field(False, description="Allow a tokenizer's own code from its repository.")
    tensor_parallel_size: int = Field(
        1, ge=1, description="Ranks that share each layer. Head counts that it does not divide are split unevenly."
    )
    pipeline_parallel_size: int = Field(
        1,
        status="prototype",
        ge=1,
        description="Stages of successive layers, each of tensor_parallel_size ranks; on CPUs. See "
        "docs/pipeline_parallel.md.",
    )
    moe_tensor_parallel_size: int | None = Field(
        None,
        status="beta",
        ge=1,
        description="Ranks that share each expert of a mixture. Times moe_expert_parallel_size it is "
        "tensor_parallel_size. Default: what follows from the other; where neither is given, all ranks.",
    )
    moe_expert_parallel_size: int | None = Field(
        None,
        status="beta",
        ge=1,
        description="Groups of ranks that have different experts. Default: what follows from "
        "moe_tensor_parallel_size; where neither is given, 1.",
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="'auto': the checkpoint's; float32 on a CPU without fast bfloat16."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    tokenizer_revision: str | None = Field(None, description="Branch, tag or commit of a hub tokenizer.")
    backend: Literal["tensorrt", "pytorch", "_autodeploy"] | None = Field(
        None, description="'pytorch' (the default) is our engine; '_autodeploy' runs transformers' models on it."
    )

    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig, status="beta", description="Paged KV cache.")
    scheduler_config: SchedulerConfig = Field(
        default_factory=SchedulerConfig, status="prototype", description="Scheduling policies."
    )
    cache_transceiver_config: CacheTransceiverConfig | None = Field(
        None, status="prototype", description="KV exchange with other gangs. Default: none."
    )
    quant_config: QuantConfig | None = Field(
        None, status="prototype", description="Quantization of weights and KV cache. Default: none."
    )
    moe_config: MoeConfig = Field(
        default_factory=MoeConfig, status="beta", description="How mixtures of experts are computed."
    )
    speculative_config: NGramDecodingConfig | UserProvidedDecodingConfig | None = Field(
        None,
        status="prototype",
        discriminator="decoding_type",
        description="Draft tokens and verify several in one step; the tokens are the same. On CPUs. Default: none.",
    )
    enable_lora: bool = Field(False, status="beta", description="Take requests with a LoRARequest. See docs/lora.md.")
    lora_config: LoraConfig | None = Field(
        None, status="beta", description="Limits of LoRA adapters. It switches them on, as enable_lora does."
    )
    max_batch_size: int | None = Field(
        None, status="beta", ge=1, description="Most requests in one step. Default: 512 on a GPU, 256 on a CPU."
    )
    max_num_tokens: int | None = Field(
        None,
        status="beta",
        ge=1,
        description="Most tokens in one step, prompt chunks and decodes together. Default: 8192 on a GPU, 2048 on a "
        "CPU.",
    )
    max_seq_len: int | None = Field(
        None,
        status="beta",
        ge=2,
        description="Most tokens of a request, prompt and output. Default: the model's, within the KV cache's.",
    )
    enable_chunked_prefill: bool = Field(
        True, status="beta", description="Split prompts over steps so that decodes never wait long."
    )
    disable_overlap_scheduler: bool | None = Field(
        None,
        status="beta",
        description="False: a step is launched before the one before it has settled, so that a GPU computes while the "
        "host works; the tokens are the same. True: one step at a time. Default: False on a GPU, and True on a CPU, "
        "which computes a step as it is launched.",
    )
    cuda_graph_config: CudaGraphConfig | None = Field(
        default_factory=CudaGraphConfig,
        status="beta",
        description="Decode steps run as CUDA graphs, where there are GPU kernels for the model; on several GPUs only "
        "with allreduce_strategy 'ONESHOT'. None: every kernel is launched by itself.",
    )
    attn_backend: Literal["TRTLLM", "VANILLA", "FLASHINFER"] = Field(
        "TRTLLM",
        status="beta",
        description="'TRTLLM', TensorRT-LLM's name for its own: our kernels, in Triton on a GPU, in C on a CPU. "
        "'VANILLA': attention in plain PyTorch, without CUDA graphs, slower, to compare with. 'FLASHINFER' is refused.",
    )
    allreduce_strategy: Literal["AUTO", "NCCL", "ONESHOT"] = Field(
        "AUTO",
        status="beta",
        description="How the ranks of a model on several GPUs sum. 'AUTO' and 'NCCL': by NCCL, between steps of "
        "PyTorch. 'ONESHOT': by our kernels in each other's memory, as part of the steps and CUDA graphs that one GPU "
        "has; it has not been measured on several GPUs yet.",
    )
    max_queued_requests: int = Field(
        1024,
        status="beta",
        ge=1,
        description="Requests an executor holds, running and waiting; one more is answered 'overloaded', or waits its "
        "turn in the LLM class.",
    )
    guided_decoding_backend: Literal["auto", "xgrammar", "llguidance"] | None = Field(
        "auto",
        status="prototype",
        description="Library that makes outputs follow a schema, a regular expression or a grammar. 'auto': xgrammar, "
        "and llguidance for what xgrammar would not enforce; None: such requests are refused.",
    )
    generation_config: Literal["auto", "none", "trtllm"] = Field(
        "none",
        status="prototype",
        description="'auto': sampling fields that a request leaves out are those of the model's "
        "generation_config.json. 'none', which TensorRT-LLM calls 'trtllm': they are not. A service's default is "
        "'auto'.",
    )
    reasoning_parser: str | None = Field(
        None,
        status="prototype",
        description="The family of models in whose form this one writes its reasoning, such as 'qwen3'; 'none': "
        "answers are not searched for it. Default: the tokenizer's chat template tells.",
    )
    tool_parser: str | None = Field(
        None,
        status="prototype",
        description="The same for calls of tools, which chats over HTTP may have.",
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", status="prototype", description="'dummy': random weights, for speed tests."
    )
    enable_tqdm: bool = Field(
        False,
        status="prototype",
        description="Show progress bars while the model is loaded and warmed up; LLM only, on one rank.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", status="prototype", description="'auto': cuda where there is a GPU."
    )
    num_threads: int | None = Field(
        None,
        status="prototype",
        ge=1,
        description="CPU threads of each rank. Default: the machine's cores over its ranks.",
    )
    hang_timeout_s: float = Field(
        8.0,
        status="beta",
        gt=0,
        description="A step loop without progress for this long ends its gang; each layer of a step is progress.",
    )
    enable_iter_perf_stats: bool = Field(
        True, status="prototype", description="Keep statistics of every step for get_stats."
    )
    iter_stats_max_iterations: int = Field(
        1000, status="prototype", ge=1, description="Steps whose statistics are kept for get_stats."
    )
    return_perf_metrics: bool = Field(
        False, status="prototype", description="Give every output its request_perf_metrics; LLM only."
    )
    batched_logits_processor: Any = Field(
        None,
        status="prototype",
        description="A callable that edits the logits of all requests with apply_batched_logits_processor in one call "
        "a step: (req_ids, logits, token_ids, stream_ptr, client_ids), lists of what one gets; LLM only.",
    )
    garbage_collection_gen0_threshold: int = Field(
        20000,
        status="beta",
        ge=1,
        description="Objects that a rank's process (at one rank this one) makes before Python's garbage collector "
        "looks at the youngest.",
    )
    scheduler: str | None = Field(
        None, status="prototype", description="'package.module:Class' of your own scheduler; see docs/scheduler.md."
    )
    kv_cache_manager: str | None = Field(
        None,
        status="prototype",
        description="'package.module:Class' of your own KV cache manager; see docs/kv_cache_manager.md.",
    )

    @field_validator("speculative_config", mode="before")
    @classmethod
    def _check_speculation(cls, value: Any) -> Any:
        return check_decoding_type(value)

    @field_validator("allreduce_strategy", mode="before")
    @classmethod
    def _check_allreduce(cls, value: Any) -> Any:
        if value is not None and value not in _ALLREDUCE_STRATEGIES:
            known = "'AUTO' (the default), 'NCCL' or 'ONESHOT'"
            raise ValueError(f"allreduce_strategy {value!r} is not part of tensorweave; use {known}")
        return "AUTO" if value is None else value

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.speculative_config is not None and self.disable_overlap_scheduler is False:
            raise ValueError(
                "speculative_config drafts from tokens that have settled; leave disable_overlap_scheduler out, or True"
            )
        if self.backend == "tensorrt":
            raise ValueError("backend 'tensorrt' is not part of tensorweave; use backend='pytorch' (the default)")
        if self.enable_tqdm and gang_mesh(self).size > 1:
            raise ValueError("enable_tqdm shows bars for one rank; with more, the log tells how the start goes")
        if self.attn_backend == "FLASHINFER":
            raise ValueError(
                "attn_backend 'FLASHINFER' is not part of tensorweave; use 'TRTLLM' (the default), our own kernels"
            )
        if self.backend == "_autodeploy" and self.tensor_parallel_size > 1:
            raise ValueError(
                f"backend '_autodeploy' runs on one rank; tensor_parallel_size is {self.tensor_parallel_size}"
            )
        if self.backend == "_autodeploy" and (self.enable_lora or self.lora_config is not None):
            raise ValueError("backend '_autodeploy' takes no LoRA adapters: leave enable_lora and lora_config out")
        is_quantized = weight_quantization(self.quant_config) or kv_cache_dtype(self) != "auto"
        if self.backend == "_autodeploy" and is_quantized:
            raise ValueError("backend '_autodeploy' runs checkpoints as they are: no quant_config, no 8-bit KV cache")
        if self.batched_logits_processor is not None and not callable(self.batched_logits_processor):
            kind = type(self.batched_logits_processor).__name__
            raise ValueError(f"batched_logits_processor is a {kind}, which cannot be called")
        return self

    @model_validator(mode="after")
    def _check_expert_groups(self) -> Self:
        gang_mesh(self)
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        """Refuse what pipeline stages do not do."""
        if self.pipeline_parallel_size == 1:
            return self
        transfers = self.cache_transceiver_config
        given = {
            "cache_transceiver_config (pools of role 'prefill' or 'decode')": transfers is not None
            and transfers.backend is not None,
            "speculative_config": self.speculative_config is not None,
            "device 'cuda'": self.device == "cuda",
            "scheduler": self.scheduler is not None,
            "backend '_autodeploy'": self.backend == "_autodeploy",
        }
        if refused := [name for name, is_given in given.items() if is_given]:
            raise ValueError(
                f"pipeline_parallel_size is {self.pipeline_parallel_size}: pipeline stages do not support "
                f"{', '.join(refused)} yet; leave out one or the other"
            )
        return self


def gang_mesh(args: TorchLlmArgs) -> Mesh:
    """How the ranks of a gang divide the model."""
    tensor = args.tensor_parallel_size
    expert = expert_groups(tensor, args.moe_tensor_parallel_size, args.moe_expert_parallel_size)
    return Mesh(tensor=tensor, pipeline=args.pipeline_parallel_size, expert=expert)


def adapter_config(args: TorchLlmArgs) -> LoraConfig | None:
    """None where adapters are off. A `lora_config` switches them on, whatever `enable_lora` is."""
    return args.lora_config or (LoraConfig() if args.enable_lora else None)


def kv_cache_dtype(args: TorchLlmArgs) -> Literal["auto", "fp8"]:
    """Whichever of the two fields asks for it."""
    is_asked_for = args.quant_config is not None and args.quant_config.kv_cache_quant_algo == "FP8"
    return "fp8" if is_asked_for else args.kv_cache_config.dtype


LlmArgs = TorchLlmArgs
