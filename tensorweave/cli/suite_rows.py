"""The suites of `tensorweave bench suite`, as data, and the token lists of their rows.

`benchmarks/rival_vllm.py` reads the same module, so that both engines get the same lists; it imports the standard
library only.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tensorweave.cli.prompts import random_prompts
from tensorweave.cli.suite_shapes import LLAMA_8B, QWEN3_0_6B, QWEN3_30B_A3B, SMOLLM2_135M, TINY, ModelShape


@dataclass(frozen=True, slots=True)
class Row:
    """`num_requests` distinct prompts at once, all of one length. The best of `num_runs` counts."""

    name: str
    num_requests: int
    input_len: int
    output_len: int
    num_runs: int = 1

    @property
    def is_prefill(self) -> bool:
        """Whether the row is about prompts: then its rate counts prompt and output tokens, else output tokens."""
        return self.output_len == 1

    @property
    def num_counted_tokens(self) -> int:
        return self.num_requests * (self.output_len + (self.input_len if self.is_prefill else 0))

    def prompts(self, vocab_size: int, seed: int, run: int) -> list[list[int]]:
        """Token lists of one run, of every run different ones."""
        return random_prompts(
            self.num_requests, self.input_len, vocab_size, seed + zlib.crc32(f"{self.name}/{run}".encode())
        )


@dataclass(frozen=True, slots=True)
class Suite:
    """`engine`: arguments of `LLM`. `warmups` run first and are not reported."""

    name: str
    title: str
    shape: ModelShape
    dtype: str
    rows: Sequence[Row]
    warmups: Sequence[Row]
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def max_seq_len(self) -> int:
        return int(self.engine["max_seq_len"])

    def choose(self, names: Sequence[str] | None) -> list[Row]:
        """The rows with these names in the suite's order, all if none are given. Raises ValueError for others."""
        known = [row.name for row in self.rows]
        if unknown := sorted(set(names or ()) - set(known)):
            raise ValueError(f"suite {self.name} has no row {', '.join(unknown)}; it has {', '.join(known)}")
        return [row for row in self.rows if not names or row.name in names]


def digest_of(prompts: Sequence[Sequence[int]]) -> str:
    """16 hexadecimal digits that tell whether two runs had the same token lists."""
    state = hashlib.sha256()
    for prompt in prompts:
        state.update(array("I", [len(prompt), *prompt]).tobytes())
    return state.hexdigest()[:16]


_WARMUPS: Final = (Row("warmup_16x128", 16, 128, 32), Row("warmup_4x2000", 4, 2000, 4))
_SMALL_ROWS: Final = (Row("b1_128_128", 1, 128, 128, 4), Row("b256_128_128", 256, 128, 128, 3))
_GPU_ENGINE: Final = {"max_seq_len": 8192, "max_batch_size": 512, "max_num_tokens": 8192}

SUITES: Final[Mapping[str, Suite]] = {
    suite.name: suite
    for suite in (
        Suite(
            name="h100-8b",
            title="Llama-3.1-8B's shape",
            shape=LLAMA_8B,
            dtype="bfloat16",
            rows=(
                Row("b1_128_128", 1, 128, 128, 4),
                Row("b1_128_512", 1, 128, 512, 3),
                Row("b8_128_128", 8, 128, 128, 3),
                Row("b32_128_128", 32, 128, 128, 3),
                Row("b64_1000_200", 64, 1000, 200, 2),
                Row("prefill_2048_1_x64", 64, 2048, 1, 3),
                Row("prefill_8000_1_x16", 16, 8000, 1, 2),
                Row("b256_128_128", 256, 128, 128, 2),
                Row("tput_2048_128_x256", 256, 2048, 128, 1),
                Row("tput_1000_1000_x512", 512, 1000, 1000, 1),
            ),
            warmups=_WARMUPS,
            engine=_GPU_ENGINE,
        ),
        Suite(
            name="smollm2",
            title="SmolLM2-135M's shape",
            shape=SMOLLM2_135M,
            dtype="bfloat16",
            rows=_SMALL_ROWS,
            warmups=_WARMUPS,
            engine=_GPU_ENGINE,
        ),
        Suite(
            name="qwen3-0.6b",
            title="Qwen3-0.6B's shape",
            shape=QWEN3_0_6B,
            dtype="bfloat16",
            rows=_SMALL_ROWS,
            warmups=_WARMUPS,
            engine=_GPU_ENGINE,
        ),
        Suite(
            name="qwen3-30b-a3b",
            title="Qwen3-30B-A3B's shape",
            shape=QWEN3_30B_A3B,
            dtype="bfloat16",
            rows=(
                Row("b1_128_128", 1, 128, 128, 4),
                Row("b8_128_128", 8, 128, 128, 3),
                Row("b32_128_128", 32, 128, 128, 3),
                Row("prefill_2048_1_x16", 16, 2048, 1, 2),
                Row("b256_128_128", 256, 128, 128, 2),
            ),
            warmups=_WARMUPS,
            engine=_GPU_ENGINE,
        ),
        Suite(
            name="tiny",
            title="a tiny model, to try the suite on any machine",
            shape=TINY,
            dtype="float32",
            rows=(Row("b1_16_8", 1, 16, 8, 2), Row("b4_16_8", 4, 16, 8, 2), Row("prefill_64_1_x4", 4, 64, 1, 1)),
            warmups=(Row("warmup_2x16", 2, 16, 4),),
            engine={
                "max_seq_len": 32768,
                "max_batch_size": 8,
                "max_num_tokens": 256,
                "kv_cache_config.max_tokens": 131072,
            },
        ),
    )
}  # fmt: skip
