"""A model directory that transformers cannot load is refused with a message, whatever it raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensorweave.deploy.tiny_model import write_tiny_model
from tensorweave.router.text.tokens import Tokenizer


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_size": 577}, "577"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "long_factor"),
        ({"num_attention_heads": "six"}, "num_attention_heads"),
    ],
)
def test_a_config_that_is_wrong_is_told(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    directory = write_tiny_model(tmp_path / "model")
    Tokenizer.load(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=part) as caught:
        Tokenizer.load(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
