"""`lora_request` of the LLM class: one for each prompt, read again where the directory has changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tensorweave import LLM, GuidedDecodingParams, LoRARequest, RequestOutput, SamplingParams
from tests.llmapi.small_llm import CACHE, one
from tests.router.small_tokenizers import byte_level
from tests.workers.lora.markers import make_marked_model, write_marker

PROMPT = list(range(5, 25))
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, PreTrainedModel, Path]]:
    path = tmp_path_factory.mktemp("lora")
    model = make_marked_model(path / "model")
    with LLM(path / "model", skip_tokenizer_init=True, dtype="float32", kv_cache_config=CACHE, enable_lora=True) as llm:
        yield llm, model, path


def tokens(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def test_one_for_each_prompt(setup: tuple[LLM, PreTrainedModel, Path]) -> None:
    llm, model, path = setup
    for marker in (40, 41):
        write_marker(model, path / str(marker), marker)
    first, second = (LoRARequest(str(marker), marker, str(path / str(marker))) for marker in (40, 41))
    base = tokens(one(llm.generate(PROMPT, GREEDY)))
    outputs = llm.generate([PROMPT] * 3, GREEDY, use_tqdm=False, lora_request=[first, None, second])  # type: ignore[list-item]
    assert isinstance(outputs, list)
    assert [tokens(output) for output in outputs] == [[40] * 4, base, [41] * 4]
    assert tokens(llm.generate_async(PROMPT, GREEDY, lora_request=second).result(60)) == [41] * 4
    alike = llm.generate([PROMPT] * 2, GREEDY, use_tqdm=False, lora_request=first)
    assert isinstance(alike, list)
    assert [tokens(output) for output in alike] == [[40] * 4] * 2


def test_a_directory_that_has_changed_is_read_again(setup: tuple[LLM, PreTrainedModel, Path]) -> None:
    llm, model, path = setup
    request = None
    for marker in (60, 61):
        write_marker(model, path / "changing", marker)
        request = request or LoRARequest("changing", 1, str(path / "changing"))
        assert tokens(one(llm.generate(PROMPT, GREEDY, lora_request=request))) == [marker] * 4


def test_what_is_wrong_is_a_value_error(setup: tuple[LLM, PreTrainedModel, Path]) -> None:
    llm, _, path = setup
    with pytest.raises(ValueError, match="lora_path is 'nowhere', which is no directory"):
        LoRARequest("name", 1, "nowhere")
    with pytest.raises(ValueError, match="lora_int_id is 0"):
        LoRARequest("name", 0)
    with pytest.raises(ValueError, match="lora_ckpt_source is 'nemo'"):
        LoRARequest("name", 1, str(path), "nemo")
    with pytest.raises(ValueError, match="has no lora_path"):
        llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("name", 1))
    with pytest.raises(ValueError, match="no PEFT adapter can be read"):
        llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("name", 1, str(path)))
    with pytest.raises(ValueError, match="1 of lora_request for 2 prompts"):
        llm.generate([PROMPT] * 2, GREEDY, lora_request=[LoRARequest("name", 1, str(path))])


def test_guided_answers_are_the_adapters_choice_within_the_guide(tmp_path: Path) -> None:
    """In one batch: two adapters that want a and b, one that wants a token which the guide forbids, none; and free."""
    tokenizer = byte_level().backend
    model = make_marked_model(tmp_path / "model", vocab_size=len(tokenizer), eos_token_id=None)
    tokenizer.save_pretrained(tmp_path / "model")
    requests = list[LoRARequest | None]()
    for number, letter in enumerate("abz"):
        [marker] = tokenizer.encode(letter, add_special_tokens=False)
        write_marker(model, tmp_path / letter, marker)
        requests.append(LoRARequest(letter, number + 1, str(tmp_path / letter)))
    guided = SamplingParams(max_tokens=20, guided_decoding=GuidedDecodingParams(regex="x[ab]{5}y"))
    free = SamplingParams(max_tokens=5)
    with LLM(tmp_path / "model", dtype="float32", kv_cache_config=CACHE, enable_lora=True) as llm:
        outputs = llm.generate(
            ["Say"] * 6, [guided] * 4 + [free] * 2, use_tqdm=False, lora_request=[*requests, None, *requests[:2]]
        )
    assert isinstance(outputs, list)
    texts = [output.outputs[0].text for output in outputs]
    assert [*texts[:2], *texts[4:]] == ["xaaaaay", "xbbbbby", "aaaaa", "bbbbb"]
    assert all(re.fullmatch("x[ab]{5}y", text) for text in texts[2:4])
