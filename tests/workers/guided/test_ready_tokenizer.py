"""What is made of a tokenizer before the first guide comes: used where it has the same tokens, and allows the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tensorweave.cluster.guide import Guide
from tensorweave.workers.guided.llguidance_backend import LlguidanceCompiler, ReadyTokenizer
from tensorweave.workers.guided.vocabulary import TokenizerSource, read_vocabulary, tokens_digest
from tests.router.small_tokenizers import byte_level
from tests.workers.guided.vocabularies import SIZE, allowed, end_id

GUIDE = Guide("regex", "[a-z]{2}", "llguidance")


@pytest.fixture
def source(tmp_path: Path) -> TokenizerSource:
    byte_level().backend.save_pretrained(tmp_path)
    return TokenizerSource(str(tmp_path))


def test_it_is_used_for_the_same_tokens(source: TokenizerSource) -> None:
    vocabulary, ready = read_vocabulary(source, SIZE), ReadyTokenizer.read(source, SIZE)
    assert ready is not None
    assert ready.is_of(vocabulary)
    masks = [
        allowed(LlguidanceCompiler(vocabulary, each).compile(GUIDE).matcher((end_id(),))) for each in (ready, None)
    ]
    assert masks[0] == masks[1] != set()
    other = ReadyTokenizer.read(TokenizerSource("", json=vocabulary.tokenizer_json, end_id=end_id()), SIZE)
    assert other is not None
    assert other.is_of(vocabulary)


def test_it_is_not_used_for_others(source: TokenizerSource) -> None:
    vocabulary, ready = read_vocabulary(source, SIZE), ReadyTokenizer.read(source, SIZE)
    assert ready is not None
    for other in (
        replace(vocabulary, end_id=5),
        replace(vocabulary, size=SIZE + 1),
        replace(vocabulary, tokens_digest=b""),
    ):
        assert not ready.is_of(other)
    matcher = LlguidanceCompiler(replace(vocabulary, end_id=5), ready).compile(GUIDE).matcher((5,))
    assert matcher.accept([*byte_level().encode("ab", add_special_tokens=False), 5])


def test_the_digest_is_of_the_tokens_alone() -> None:
    written = byte_level().backend.backend_tokenizer.to_str()
    parts = json.loads(written)
    for name, value in (
        ("post_processor", None),
        ("truncation", None),
        ("decoder", {**parts["decoder"], "use_regex": False}),
    ):
        assert tokens_digest(json.dumps({**parts, name: value})) == tokens_digest(written)
    parts["added_tokens"][0]["special"] = False
    assert tokens_digest(json.dumps(parts)) != tokens_digest(written)


def test_without_a_file_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("no JSON")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "nothing"):
        assert ReadyTokenizer.read(TokenizerSource(str(path)), SIZE) is None
