"""What a GGUF file is converted to, and what is refused in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.store.gguf import convert_gguf, round_to_bfloat16, unpermute_rotary
from tests.workers.store.tiny_gguf import HEADS, KV_HEADS, TOKENS, write_tiny_gguf


def test_bfloat16_rounding_is_torchs() -> None:
    values = np.random.default_rng(1).standard_normal(10_000, dtype=np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x80000000, 0x7F7FFFFF, 0x00000001], dtype=np.uint32).view(np.float32)
    values = np.concatenate([values, values * np.float32(1e-38), ties])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(round_to_bfloat16(values), expected)


def test_unpermute_undoes_llama_cpps_order() -> None:
    weight = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    permuted = weight.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)  # 3 heads of 8: halves become neighbours
    np.testing.assert_array_equal(unpermute_rotary(permuted, 3), weight)


def test_a_tiny_model_converts_to_what_transformers_loads(tmp_path: Path) -> None:
    source, target = tmp_path / "tiny.gguf", tmp_path / "made"
    tensors = write_tiny_gguf(source)
    target.mkdir()
    convert_gguf(source, target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (HEADS, KV_HEADS)
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == json.loads((target / "config.json").read_text())["rope_theta"]
    expected = torch.from_numpy(unpermute_rotary(tensors["blk.1.attn_k.weight"], KV_HEADS)).to(torch.bfloat16)
    assert torch.equal(model.model.layers[1].self_attn.k_proj.weight, expected)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer.encode("a 12<|im_end|>")
    assert [TOKENS[i] for i in ids] == ["a", "Ġ", "1", "2", "<|im_end|>"]  # digits apart, although "12" is a token
    assert tokenizer.decode(ids) == "a 12<|im_end|>"


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "other.gguf", pre_tokenizer="llama-bpe")
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre is 'llama-bpe'"):
        convert_gguf(tmp_path / "other.gguf", tmp_path)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
            r"llama\.rope\.scaling\.type is 'linear'; only",
        ),
        (lambda w: w.add_rope_dimension_count(4), r"llama\.rope\.dimension_count is '4'; only"),
        (lambda w: w.add_sliding_window(32), r"llama\.attention\.sliding_window is '32', which cannot be converted"),
        (lambda w: w.add_expert_count(8), r"llama\.expert_count is '8', which cannot be converted"),
        (lambda w: w.add_logit_scale(0.5), r"llama\.logit_scale is '0\.5', which cannot be converted"),
        (lambda w: w.add_add_bos_token(True), r"tokenizer\.ggml\.add_bos_token is 'True'; only False"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), r"unknown tensor 'rope_freqs\.weight'"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(4, np.float32)), r"unknown tensor 'blk\.0\.attn_q\.bias'"),
    ],
)
def test_what_a_gguf_says_and_the_conversion_leaves_out_is_refused(
    add: Callable[[gguf.GGUFWriter], None], message: str, tmp_path: Path
) -> None:
    write_tiny_gguf(tmp_path / "other.gguf", add=add)
    with pytest.raises(ValueError, match=message):
        convert_gguf(tmp_path / "other.gguf", tmp_path)


def test_all_ends_of_a_gguf_are_kept(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", add=lambda writer: writer.add_eot_token_id(0))
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    assert load_model_config(tmp_path).end_ids == (0, 2)
