"""`ConfigFields`: one parsed config.json, read with types; every problem names the file, the key and its value.

Called by `families`: what is here is read alike for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.workers.models.sizes import ModelSizes

_DTYPES: Final = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """`source` is the file's name."""

    raw: Mapping[str, Any]
    source: str

    def wrong(self, key: str, supported: str) -> ValueError:
        return ValueError(f"{self.source}: {key} is {self.raw.get(key)!r}; supported: {supported}")

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

    def number(self, key: str, default: float) -> float:
        """Above 0."""
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.wrong(key, "a number above 0")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.raw.get(key) is None else self.number(key, 0.0)

    def require(self, key: str, implied: bool, family: str) -> None:
        """A key that the family's class in transformers does not read must say what is so anyway."""
        if self.raw.get(key) not in (None, implied):
            raise self.wrong(key, f"{str(implied).lower()}, which {family} models have without saying")

    def sizes(self, default_kv_heads: int | None, default_head_dim: int | None, norm_offset: float = 0.0) -> ModelSizes:
        """The defaults are what a family's class takes where the key is not there at all."""
        heads, hidden = self.count("num_attention_heads"), self.count("hidden_size")
        return ModelSizes(
            vocab_size=self.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.count("intermediate_size"),
            num_layers=self.count("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=self._kv_heads(heads, default_kv_heads),
            head_dim=self._head_dim(hidden, heads, default_head_dim),
            norm_epsilon=self._epsilon(),
            norm_offset=norm_offset,
        )

    def dtype(self) -> str:
        key = "dtype" if self.raw.get("dtype") is not None else "torch_dtype"
        value = self.raw.get(key) or "float32"
        if value not in _DTYPES:
            raise self.wrong(key, ", ".join(_DTYPES))
        if self.raw.get("torch_dtype") not in (None, value):
            raise self.wrong("torch_dtype", f"the same as dtype ({value})")
        return str(value)

    def _kv_heads(self, heads: int, default: int | None) -> int:
        if "num_key_value_heads" not in self.raw and default is not None:
            kv_heads = default
        else:
            kv_heads = heads if self.raw.get("num_key_value_heads") is None else self.count("num_key_value_heads")
        if heads % kv_heads:
            raise self.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        return kv_heads

    def _head_dim(self, hidden: int, heads: int, default: int | None) -> int:
        if self.raw.get("head_dim") is not None:
            dim = self.count("head_dim")
        elif default is not None and "head_dim" not in self.raw:
            dim = default
        elif hidden % heads:
            raise self.wrong("num_attention_heads", f"a divisor of hidden_size ({hidden}), or an explicit head_dim")
        else:
            dim = hidden // heads
        if dim % 2:
            raise self.wrong("head_dim", f"an even size, to be rotated in pairs (here {dim})")
        return dim

    def _epsilon(self) -> float:
        value = self.raw.get("rms_norm_eps", 1e-6)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise self.wrong("rms_norm_eps", "a number of at least 0")
        return float(value)
