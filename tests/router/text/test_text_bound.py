"""A text is refused before it is tokenized only where no tokenization of it can fit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from tensorweave.router.text.text_bound import max_chars_per_token
from tests.router.small_tokenizers import byte_fallback, byte_level


def byte_level_with(normalizer: normalizers.Normalizer | None = None, added: AddedToken | None = None) -> RustTokenizer:
    rust = RustTokenizer(models.BPE({"a": 0, "aaaa": 1}, []))
    rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    if normalizer is not None:
        rust.normalizer = normalizer
    if added is not None:
        rust.add_tokens([added])
    return rust


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
def test_no_text_has_more_characters_a_token(text: str) -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        assert tokenizer.max_chars_per_token is not None
        assert len(text) <= tokenizer.max_chars_per_token * len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("normalizer", "bound"),
    [
        (None, 4),
        (normalizers.NFC(), 16),  # up to four code points become one
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), 4),
        (normalizers.Replace("  ", " "), None),
        (normalizers.Strip(), None),
        (normalizers.BertNormalizer(), None),
    ],
)
def test_normalizers(normalizer: normalizers.Normalizer | None, bound: int | None) -> None:
    assert max_chars_per_token(byte_level_with(normalizer)) == bound


def test_the_longest_added_token_counts() -> None:
    assert max_chars_per_token(byte_level_with(added=AddedToken("<|thirteen|>"))) == 12


def test_a_token_that_takes_white_space_along_has_no_bound() -> None:
    assert max_chars_per_token(byte_level_with(added=AddedToken("<mask>", lstrip=True))) is None


@pytest.mark.parametrize(
    "model", [models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"), models.BPE({"a": 0}, []), models.WordLevel({"a": 0})]
)
def test_a_word_may_be_one_token(model: models.Model) -> None:
    assert max_chars_per_token(RustTokenizer(model)) is None
