"""The real model in its own Q4_1 blocks: the tokens of its bfloat16 conversion, whole and on three ranks."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from tensorweave.workers.store.model_store import resolve_model
from tests.workers.engine_drive import generate_on_ranks
from tests.workers.store.test_model_store import GREEDY

pytestmark = [
    pytest.mark.model,
    pytest.mark.long("downloads 90 MB"),
]


@pytest.mark.parametrize("size", [1, 3])
def test_greedy_ids_are_the_recorded_ones(size: int) -> None:
    directory = resolve_model("smollm2-gguf")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for prompt, (prompt_len, ids) in GREEDY.items():
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        expected = [int(i) for i in ids.split()]
        assert len(tokens) == prompt_len
        assert generate_on_ranks(directory, size, [tokens], len(expected)) == [expected]
