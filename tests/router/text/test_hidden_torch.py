"""A process that hides torch from transformers has the same tokenizers, and never loads torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorweave.router.text.chat_template import ChatPrompt
from tensorweave.router.text.tokens import Tokenizer
from tests.router.small_tokenizers import hermes, llama2, metaspace

REPOSITORY = Path(__file__).resolve().parents[3]
TEXT = "<|im_start|>user\nGrüße aus 東京 😀!<|im_end|>"
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "So?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CHILD = """
import sys
from pathlib import Path
from tensorweave.cluster.without_torch import hide_torch_from_transformers
hide_torch_from_transformers()
from tests.router.text.test_hidden_torch import what_it_says
print(what_it_says([Path(each) for each in sys.argv[1:]]))
assert "torch" not in sys.modules
"""


def what_it_says(folders: list[Path]) -> str:
    said: list[Any] = []
    for folder in folders:
        for mode in ("auto", "slow"):
            tokenizer = Tokenizer.load(folder, tokenizer_mode=mode)
            ids = tokenizer.encode(TEXT)
            said += [ids, tokenizer.decode(ids), tokenizer.vocab_size, tokenizer.eos_id, sorted(tokenizer.special_ids)]
            if tokenizer.chat_template:
                said += [tokenizer.chat(ChatPrompt(CHAT)), tokenizer.render_chat(ChatPrompt(CHAT, tools=TOOLS))]
    return json.dumps(said)


def test_tokenizers_are_the_same_and_torch_is_not_loaded(tmp_path: Path) -> None:
    folders = []
    for number, tokenizer in enumerate([hermes(), metaspace(), llama2()]):
        folders.append(tmp_path / str(number))
        tokenizer.backend.save_pretrained(folders[-1])
    command = [sys.executable, "-c", CHILD, *map(str, folders)]
    child = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines()[-1] == what_it_says(folders)
