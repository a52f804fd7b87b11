"""`ModelConfig`: everything the transformer needs to know of a model, read strictly from a Hugging Face config.json.

Llama, Mistral, Qwen2 and Qwen3, in transformers 4's spelling and 5's. What we would compute wrongly is refused: the
message names the file, the key, its value and what is supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tensorweave.workers.models.config_keys import refuse_unknown_keys
from tensorweave.workers.models.generation_config import (
    GenerationConfig,
    load_generation_config,
    read_json,
    unite_end_ids,
)
from tensorweave.workers.models.rope_config import RopeConfig


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture leaves unsaid in its config.json. `kv_heads` is None where all heads have their own."""

    model_type: str
    qkv_bias: bool | None = None
    has_attention_bias_key: bool = False
    has_mlp_bias_key: bool = False
    has_qk_norm: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    every_layer_slides: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", has_attention_bias_key=True, has_mlp_bias_key=True),
    "MistralForCausalLM": _Family("mistral", kv_heads=8, sliding_window=4096, every_layer_slides=True),
    "Qwen2ForCausalLM": _Family("qwen2", qkv_bias=True, kv_heads=32, sliding_window=4096),
    "Qwen3ForCausalLM": _Family(
        "qwen3", has_attention_bias_key=True, has_qk_norm=True, kv_heads=32, head_dim=128, sliding_window=4096
    ),
}
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer. `windows[i]` is how many positions layer i looks back, itself included; None: all."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_seq_len: int
    rope: RopeConfig
    windows: tuple[int | None, ...]
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    has_tied_embeddings: bool = False
    checkpoint_dtype: str = "float32"
    end_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read a parsed config.json. Raises ValueError that names key, value and what is supported."""
        fields = _Fields(raw, source)
        architecture, family = fields.family()
        fields.refuse_what_we_do_not_run(family)
        heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
        kv_heads = fields.kv_heads(heads, family)
        max_len = fields.count("max_position_embeddings")
        rope = RopeConfig.from_hf(raw, max_len, source)
        layers, vocab_size = fields.count("num_hidden_layers"), fields.count("vocab_size")
        attention_bias = family.has_attention_bias_key and fields.flag("attention_bias")
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=fields.head_dim(hidden, heads, family),
            rms_norm_eps=fields.epsilon(),
            max_seq_len=rope.max_len(max_len),
            rope=rope,
            windows=fields.windows(layers, family),
            has_qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            has_output_bias=attention_bias,
            has_mlp_bias=family.has_mlp_bias_key and fields.flag("mlp_bias"),
            has_qk_norm=family.has_qk_norm,
            has_tied_embeddings=fields.flag("tie_word_embeddings"),
            checkpoint_dtype=fields.dtype(),
            end_ids=unite_end_ids(vocab_size, GenerationConfig(raw, source).end_ids),
        )


def load_model_config(path: str | Path) -> ModelConfig:
    """Read `path`/config.json, and the end ids of `path`/generation_config.json where there is one."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a Hugging Face model directory: it has no config.json")
    config = ModelConfig.from_hf(read_json(file), str(file))
    return replace(
        config, end_ids=unite_end_ids(config.vocab_size, config.end_ids, load_generation_config(path).end_ids)
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed, complaining access to one parsed config.json."""

    raw: Mapping[str, Any]
    source: str

    def wrong(self, key: str, supported: str) -> ValueError:
        return ValueError(f"{self.source}: {key} is {self.raw.get(key)!r}; supported: {supported}")

    def family(self) -> tuple[str, _Family]:
        names = self.raw.get("architectures")
        if not names:
            model_type = self.raw.get("model_type")
            names = [name for name, family in _FAMILIES.items() if family.model_type == model_type]
            if not names:
                raise self.wrong("model_type", ", ".join(family.model_type for family in _FAMILIES.values()))
        if not isinstance(names, list) or len(names) != 1 or names[0] not in _FAMILIES:
            raise self.wrong("architectures", ", ".join(_FAMILIES))
        return names[0], _FAMILIES[names[0]]

    def refuse_what_we_do_not_run(self, family: _Family) -> None:
        refuse_unknown_keys(self.raw, self.source)
        if self.raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise self.wrong("hidden_act", "silu")
        for key in ("quantization_config", "compression_config"):
            if self.raw.get(key):
                raise self.wrong(key, "checkpoints that are not quantized (float32, bfloat16, float16)")
        self._refuse_keys_of_other_families(family)

    def _refuse_keys_of_other_families(self, family: _Family) -> None:
        """Keys that transformers' class for this family does not read, with a value that is not so anyway."""
        model_type, name = self.raw.get("model_type"), family.model_type
        if model_type is not None and model_type != name:
            raise self.wrong("model_type", f"{name!r} for this architecture")
        window = self.raw.get("sliding_window")
        if name == "llama":
            if window and window < self.count("max_position_embeddings"):
                raise self.wrong("sliding_window", "null for Llama")
            if set(self.raw.get("layer_types") or ()) - {"full_attention"}:
                raise self.wrong("layer_types", "full_attention in every layer for Llama")
        if family.every_layer_slides and window and self.raw.get("use_sliding_window") is False:
            raise self.wrong("use_sliding_window", "true where sliding_window is given, for Mistral")
        if not family.has_attention_bias_key:
            bias = family.qkv_bias is True
            if self.raw.get("attention_bias") not in (None, bias):
                raise self.wrong("attention_bias", f"{str(bias).lower()}, which {name} models have without saying")
        if not family.has_mlp_bias_key and self.flag("mlp_bias"):
            raise self.wrong("mlp_bias", f"false for {name}")

    def count(self, key: str) -> int:
        value = self.raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a whole number of at least 1")
        return value

    def flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def kv_heads(self, heads: int, family: _Family) -> int:
        if "num_key_value_heads" not in self.raw and family.kv_heads is not None:
            kv_heads = family.kv_heads
        else:
            kv_heads = heads if self.raw.get("num_key_value_heads") is None else self.count("num_key_value_heads")
        if heads % kv_heads:
            raise self.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        return kv_heads

    def head_dim(self, hidden: int, heads: int, family: _Family) -> int:
        if self.raw.get("head_dim") is not None:
            dim = self.count("head_dim")
        elif family.head_dim is not None and "head_dim" not in self.raw:
            dim = family.head_dim
        elif hidden % heads:
            raise self.wrong("num_attention_heads", f"a divisor of hidden_size ({hidden}), or an explicit head_dim")
        else:
            dim = hidden // heads
        if dim % 2:
            raise self.wrong("head_dim", f"an even size, to be rotated in pairs (here {dim})")
        return dim

    def epsilon(self) -> float:
        value = self.raw.get("rms_norm_eps", 1e-6)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise self.wrong("rms_norm_eps", "a number of at least 0")
        return float(value)

    def windows(self, layers: int, family: _Family) -> tuple[int | None, ...]:
        if family.model_type == "llama":
            return (None,) * layers
        window = self.raw.get("sliding_window", family.sliding_window)
        if not family.every_layer_slides and not self.flag("use_sliding_window"):
            window = None
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise self.wrong("sliding_window", "a whole number of at least 1, or null")
        if family.every_layer_slides:
            implied: tuple[int | None, ...] = (window,) * layers
        else:
            first = self.raw.get("max_window_layers", 28)
            implied = tuple(window if i >= first else None for i in range(layers))
        return implied if self.raw.get("layer_types") is None else self._layer_types(implied, window, family)

    def _layer_types(
        self, implied: tuple[int | None, ...], window: int | None, family: _Family
    ) -> tuple[int | None, ...]:
        types = self.raw["layer_types"]
        if not isinstance(types, list) or len(types) != len(implied):
            raise self.wrong("layer_types", f"one entry for each of {len(implied)} layers")
        for kind in types:
            if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and window is None):
                raise self.wrong("layer_types", "full_attention, and sliding_attention where sliding_window is in use")
        stated = tuple(window if kind == "sliding_attention" else None for kind in types)
        if family.every_layer_slides and stated != implied:
            raise self.wrong("layer_types", "the same kind in every layer for Mistral, as sliding_window says")
        return stated

    def dtype(self) -> str:
        key = "dtype" if self.raw.get("dtype") is not None else "torch_dtype"
        value = self.raw.get(key) or "float32"
        if value not in _DTYPES:
            raise self.wrong(key, ", ".join(_DTYPES))
        if self.raw.get("torch_dtype") not in (None, value):
            raise self.wrong("torch_dtype", f"the same as dtype ({value})")
        return str(value)
