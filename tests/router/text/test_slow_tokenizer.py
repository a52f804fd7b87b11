"""tokenizer_mode 'slow': transformers' own methods, with the same tokens and texts; and what is no tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from tensorweave.router.text.detokenize import IncrementalDetokenizer
from tensorweave.router.text.pieces import ByteLevelPieces, WindowedPieces
from tensorweave.router.text.tokens import Tokenizer
from tests.router.small_tokenizers import byte_level, slow_byte_level, slow_llama2

TEXT = "<|im_start|>user\nGrüße aus 東京 😀!<|im_end|>"


@pytest.mark.parametrize("skips_special", [True, False])
def test_slow_and_fast_say_the_same(skips_special: bool, tmp_path: Path) -> None:
    byte_level().backend.save_pretrained(tmp_path)
    fast, slow = (Tokenizer.load(tmp_path, tokenizer_mode=mode) for mode in ("auto", "slow"))
    pieces = [t.pieces(spaces_between_special_tokens=True) for t in (fast, slow)]
    assert [type(each) for each in pieces] == [ByteLevelPieces, WindowedPieces]
    ids = fast.encode(TEXT)
    assert slow.encode(TEXT) == ids
    assert slow.special_ids == fast.special_ids
    assert slow.decode(ids, skip_special_tokens=skips_special) == fast.decode(ids, skip_special_tokens=skips_special)
    texts = []
    for tokenizer in (fast, slow):
        detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skips_special)
        texts.append("".join([detokenizer.push([token]) for token in ids]) + detokenizer.flush())
    assert texts[0] == texts[1] == fast.decode(ids, skip_special_tokens=skips_special)


def test_an_object_that_is_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="a int is no tokenizer"):
        Tokenizer.load(5)


@pytest.mark.parametrize("which", [slow_byte_level, slow_llama2])
def test_many_tokens_at_once_that_end_within_a_character(which: Callable[[], Tokenizer]) -> None:
    """As a sequence that was lost and begun again brings them: in one step."""
    tokenizer = which()
    ids = tokenizer.encode("a b a b a b a b 😺 a", add_special_tokens=False)
    for cut in range(len(ids)):
        detokenizer = IncrementalDetokenizer(tokenizer)
        text = detokenizer.push(ids[:cut]) + detokenizer.push(ids[cut:]) + detokenizer.flush()
        assert text == "a b a b a b a b 😺 a"


def test_ids_that_only_the_model_has_are_no_error() -> None:
    """A tokenizer of Python alone, whose decode raises for them."""
    tokenizer = Tokenizer(ByT5Tokenizer(extra_ids=0))
    ids = tokenizer.encode("é", add_special_tokens=False)
    unknown = 100_000
    assert tokenizer.decode([unknown, *ids, unknown]) == "é"
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([unknown, *ids, unknown]) + detokenizer.flush() == "é"
    assert tokenizer.token_bytes(unknown) == b""


@pytest.mark.parametrize("which", [byte_level, slow_byte_level])
def test_a_prompt_that_ends_within_a_character_behind_another(which: Callable[[], Tokenizer]) -> None:
    """One token has the end of 日 and the beginning of 本: only 本 is the answer's."""
    tokenizer = which()
    ids = tokenizer.encode("é日本", add_special_tokens=False)
    places = [place for place, token_id in enumerate(ids) if tokenizer.token_bytes(token_id) == b"\x97\xa5\xe6"]
    assert places
    cut = places[0] + 1
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.left_context(ids[:cut]))
    assert detokenizer.push(ids[cut:]) + detokenizer.flush() == "本"
