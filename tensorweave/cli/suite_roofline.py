"""The least time of a suite's row on a device: its bytes at the device's read rate, its operations at its product rate.

All prompts are computed first, then all requests decode together. A step takes at least the larger of reading the
weights and multiplying by them, and then reads the KV of all requests. What a row moves or computes beyond that
(activations, norms, sampling, writing KV, weights read again where not all requests fit at once) is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorweave.cli.suite_rows import Row
from tensorweave.cli.suite_shapes import ModelShape

BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1, "w4a16": 0.5 + 2 / 128}
"""Of a weight; `w4a16`: with a scale of 16 bits for 128 of them."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured on the device, per second. `layer_operations` are those of the layers' products, which may be FP8."""

    read_bytes: float
    operations: float
    layer_operations: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """`dtype` is that of the output head's weights."""

    shape: ModelShape
    rates: Rates
    dtype: str
    layer_dtype: str
    kv_dtype: str

    def row_s(self, row: Row) -> float:
        """Seconds of a row: its prompts, whose last tokens give the first output tokens, and the steps after them."""
        return self.prefill_s(row) + self.decode_s(row)

    def prefill_s(self, row: Row) -> float:
        n, length = row.num_requests, row.input_len
        pairs = n * length * (length + 1) // 2
        attention_s = pairs * self.shape.attention_operations / self.rates.operations
        return max(self._products_s(n * length, n) + attention_s, self._weights_s(n * length))

    def decode_s(self, row: Row) -> float:
        n, num_steps = row.num_requests, row.output_len - 1
        tokens_read = n * (num_steps * row.input_len + num_steps * (num_steps + 1) // 2)
        kv_bytes = tokens_read * self.shape.num_kv_elements * BYTES[self.kv_dtype]
        return num_steps * max(self._products_s(n, n), self._weights_s(n)) + kv_bytes / self.rates.read_bytes

    def weight_bytes(self, num_tokens: int) -> float:
        """What a step reads. Norms, and the embedding's rows of its tokens, are too small to count."""
        layers = self.shape.num_read_weights(num_tokens) * BYTES[self.layer_dtype]
        return layers + self.shape.num_head_weights * BYTES[self.dtype]

    def _weights_s(self, num_tokens: int) -> float:
        return self.weight_bytes(num_tokens) / self.rates.read_bytes

    def _products_s(self, num_tokens: int, num_sampled: int) -> float:
        layers_s = 2 * num_tokens * self.shape.num_token_weights / self.rates.layer_operations
        return layers_s + 2 * num_sampled * self.shape.num_head_weights / self.rates.operations
