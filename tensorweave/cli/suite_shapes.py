"""Shapes of the models that the suites of `tensorweave bench suite` run with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_LLAMA: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
}
_QWEN3: Final = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "use_sliding_window": False,
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a decoder of this kind computes and reads. `config` is its config.json."""

    config: Mapping[str, Any]

    @classmethod
    def read(cls, model_dir: Path) -> ModelShape:
        """Raises ValueError where there is no config.json, or one that is not JSON."""
        try:
            return cls(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{model_dir} has no config.json that can be read: {error.strerror}") from None

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def num_experts(self) -> int:
        """The experts of each layer; 0 without mixtures."""
        return int(self.config.get("num_experts", 0))

    @property
    def num_layer_weights(self) -> int:
        """Elements of all layers' matrices."""
        if self.num_experts:
            return self._num_shared_weights + self.num_experts * self._num_expert_weights
        return self._num_shared_weights

    @property
    def num_token_weights(self) -> int:
        """The weights that one token is multiplied by: each makes two operations."""
        return self._num_shared_weights + self._num_chosen * self._num_expert_weights

    def num_read_weights(self, num_tokens: int) -> float:
        """Of those, what a step of so many tokens reads, each once: of experts, those that tokens choose if each
        chooses evenly and by itself."""
        if not self.num_experts:
            return self.num_layer_weights
        hit = self.num_experts * (1 - (1 - self._num_chosen / self.num_experts) ** num_tokens)
        return self._num_shared_weights + hit * self._num_expert_weights

    @property
    def _num_chosen(self) -> int:
        return int(self.config["num_experts_per_tok"]) if self.num_experts else 0

    @property
    def _num_expert_weights(self) -> int:
        """The weights of one expert, all layers together."""
        width = int(self.config.get("moe_intermediate_size", 0))
        return int(self.config["num_hidden_layers"]) * 3 * int(self.config["hidden_size"]) * width

    @property
    def _num_shared_weights(self) -> int:
        """What every token is multiplied by."""
        hidden, heads, kv_heads = (
            int(self.config[key]) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        attention = hidden * self.head_dim * (heads + 2 * kv_heads) + heads * self.head_dim * hidden
        mlp = hidden * self.num_experts if self.num_experts else 3 * hidden * int(self.config["intermediate_size"])
        return int(self.config["num_hidden_layers"]) * (attention + mlp)

    @property
    def num_head_weights(self) -> int:
        """Elements of the matrix that makes logits."""
        return self.vocab_size * int(self.config["hidden_size"])

    @property
    def num_kv_elements(self) -> int:
        """Keys and values of one token, all layers together."""
        return 2 * int(self.config["num_hidden_layers"]) * int(self.config["num_key_value_heads"]) * self.head_dim

    @property
    def attention_operations(self) -> int:
        """Operations for one pair of a query token and a key token, all layers together: the scores and the weighted
        sum."""
        return 4 * int(self.config["num_hidden_layers"]) * int(self.config["num_attention_heads"]) * self.head_dim

    def write(self, directory: Path, dtype: str) -> Path:
        """Write config.json. With `load_format="dummy"` an engine needs no more than that."""
        config = {**self.config, "torch_dtype": dtype}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return directory


LLAMA_8B: Final = ModelShape(
    {
        **_LLAMA,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    }
)
SMOLLM2_135M: Final = ModelShape(
    {
        **_LLAMA,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
)
QWEN3_0_6B: Final = ModelShape(
    {
        **_QWEN3,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    }
)
QWEN3_30B_A3B: Final = ModelShape(
    {
        **_QWEN3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    }
)
TINY: Final = ModelShape(
    {
        **_LLAMA,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 65536,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 512,
    }
)
LLAMA_8B_SMALL_VOCABULARY: Final = ModelShape(
    {**LLAMA_8B.config, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 49152}
)
"""Llama-3.1-8B's layers with SmolLM2's vocabulary, so that its tokenizer fits: for tests over HTTP."""
