"""The LLM constructor's arguments, under the name that the API documents. Defined in `cluster`, because ranks receive
them too."""

from tensorweave.cluster.cache_transceiver_config import CacheTransceiverConfig
from tensorweave.cluster.cuda_graph_config import CudaGraphConfig
from tensorweave.cluster.kv_cache_config import KvCacheConfig
from tensorweave.cluster.llm_args import LlmArgs, TorchLlmArgs
from tensorweave.cluster.lora_config import LoraConfig
from tensorweave.cluster.moe_config import MoeConfig
from tensorweave.cluster.quant_config import QuantAlgo, QuantConfig
from tensorweave.cluster.scheduler_config import SchedulerConfig
from tensorweave.cluster.strict_model import Field, StrictBaseModel

__all__ = [
    "CacheTransceiverConfig",
    "CudaGraphConfig",
    "Field",
    "KvCacheConfig",
    "LlmArgs",
    "LoraConfig",
    "MoeConfig",
    "QuantAlgo",
    "QuantConfig",
    "SchedulerConfig",
    "StrictBaseModel",
    "TorchLlmArgs",
]
