"""Any causal language model of transformers' on our paged attention: its own greedy ids, or a refusal by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.autodeploy.attention import Layer, Survey
from tensorweave.workers.autodeploy.loader import load_autodeploy
from tensorweave.workers.build import build_executor, check_model
from tensorweave.workers.engine_dir.directory import save_engine_dir
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.step.pending import NothingPending
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.resources import BlockCopy
from tests.workers.engine_drive import ScatteredBlocks, engine_args, generate, logits_of, make_request, random_prompts
from tests.workers.tiny_models import THETA, VOCAB, make_model, rewrite_config, save_randomized, their_greedy
from tests.workers.waiting import WAIT_S

PROMPTS = [*random_prompts(5, 70), [7], [5] * 33]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", {}),
    "phi3": ("Phi3", {"sliding_window": 29}),
    "olmo2": ("Olmo2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 32}),
    "cohere2": (
        "Cohere2",
        {"sliding_window": 17, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
WITHOUT_FAMILY = [name for name in MODELS if name not in ("phi3", "olmo2")]


def make(name: str, path: Path, **changes: Any) -> PreTrainedModel:
    """A tiny random model, written to `path`."""
    family, fields = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **fields, **changes})
    torch.manual_seed(0)
    return save_randomized(getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config), path)


def args_for(path: Path, **knobs: Any) -> TorchLlmArgs:
    return engine_args(path, backend="_autodeploy", **knobs)


@pytest.mark.parametrize("name", WITHOUT_FAMILY)
def test_greedy_ids_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path)
    expected = their_greedy(model, PROMPTS, 8)
    engine = load_autodeploy(args_for(tmp_path), SoloComm())
    assert generate(engine, PROMPTS, 8, chunk=24) == expected
    assert engine.info.vocab_size == VOCAB
    assert engine.info.end_ids == (2,)


@pytest.mark.parametrize("name", ["cohere2", "mixtral"])
def test_bfloat16_and_random_weights_run(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    engines = [load_autodeploy(args_for(tmp_path, load_format="dummy", dtype="bfloat16"), SoloComm()) for _ in range(2)]
    first, second = (generate(engine, PROMPTS[:3], 5) for engine in engines)
    assert first == second
    assert engines[0].info.dtype == "bfloat16"


def test_prompt_logits_and_copied_blocks(tmp_path: Path) -> None:
    model = make("olmo2", tmp_path)
    engine = load_autodeploy(args_for(tmp_path), SoloComm())
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    prompt = random_prompts(1, 60, seed=5)[0][:22] + [1] * 11
    request, other = make_request(0, prompt), make_request(1, [*prompt[:16], 9])
    request.num_prompt_rows = len(prompt)
    batch = ScheduledBatch((StepRow.of_context(request, 0, len(prompt)),))
    [(read, logits)] = engine.launch(batch, resources, NothingPending()).result().prompts
    with torch.no_grad():
        theirs = model(torch.tensor([prompt])).logits[0]
    assert (read.start, read.stop) == (0, len(prompt))
    torch.testing.assert_close(logits, theirs, atol=2e-4, rtol=1e-3)
    resources.copies.append(BlockCopy(resources.block_ids(request)[0], resources.block_ids(other)[0], 16))
    reused = logits_of(engine, ScheduledBatch((StepRow.of_context(other, 16, 1),)), resources)
    with torch.no_grad():
        expected = model(torch.tensor([other.tokens])).logits[0, -1:]
    torch.testing.assert_close(reused, expected, atol=2e-4, rtol=1e-3)
    reused[:, 0] = 1.0  # a decoder edits logits in place


def test_an_executor_runs_on_it(tmp_path: Path) -> None:
    model = make("gpt_neox", tmp_path)
    expected = their_greedy(model, PROMPTS, 6)
    executor = build_executor(args_for(tmp_path, max_num_tokens=64), SoloComm())
    executor.start()
    try:
        sampling = SamplingSpec(max_tokens=6)
        answers: dict[str, list[int]] = {f"r{i}": [] for i in range(len(PROMPTS))}
        for request_id, prompt in zip(answers, PROMPTS, strict=True):
            executor.enqueue_request(GenerateRequest(request_id, prompt, sampling))
        unfinished = set(answers)
        while unfinished:
            chunks = executor.await_responses(timeout_s=WAIT_S)
            assert chunks, "hangs"
            for chunk in chunks:
                answers[chunk.request_id] += chunk.token_ids
                if chunk.is_last:
                    unfinished.remove(chunk.request_id)
    finally:
        executor.shutdown()
    assert list(answers.values()) == expected


# ---- what is refused


def test_two_rotations_are_refused(tmp_path: Path) -> None:
    """transformers takes `rope_scaling` and drops the other without a word."""
    make("olmo2", tmp_path)
    linear = {"type": "linear", "factor": 2.0}
    rewrite_config(tmp_path, lambda fields: fields.update(rope_scaling=linear))
    with pytest.raises(ValueError, match=r"rope_scaling is .*linear.* beside rope_parameters .*default.*keep one"):
        check_model(args_for(tmp_path))
    same = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    rewrite_config(tmp_path, lambda fields: fields.update(rope_parameters=same))
    check_model(args_for(tmp_path))


def _config(path: Path, family: str, **fields: Any) -> None:
    getattr(transformers, f"{family}Config")(**fields).save_pretrained(path)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("T5", "T5.*: it is an encoder-decoder model|t5: it is an encoder-decoder model"),
        ("Mamba", "mamba: it keeps a state that is not keys and values"),
        ("Jamba", "jamba: it keeps a state that is not keys and values"),
        ("Bloom", "bloom: its attention cannot be replaced"),
        ("ViT", "transformers has no causal language model of type 'vit'"),
    ],
)
def test_an_architecture_that_its_config_gives_away(family: str, message: str, tmp_path: Path) -> None:
    _config(tmp_path, family)
    with pytest.raises(ValueError, match=message):
        check_model(args_for(tmp_path))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("GptOss", {**SHAPE, "head_dim": 8, "num_local_experts": 2}, "passes s_aux to its attention"),
        ("Gemma2", {**SHAPE, "head_dim": 8}, "passes softcap to its attention"),
        (
            "DeepseekV3",
            {**SHAPE, "num_key_value_heads": 6, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
             "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
            "query heads of 16 over 6 values of 8",
        ),
    ],
)  # fmt: skip
def test_attention_that_is_not_ours(family: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    _config(tmp_path, family, **fields)
    check_model(args_for(tmp_path))
    with pytest.raises(ValueError, match=f"backend '_autodeploy' cannot run {family}ForCausalLM .*{message}"):
        load_autodeploy(args_for(tmp_path, load_format="dummy"), SoloComm())


def test_a_model_that_paging_changes_is_caught_by_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("olmo2", tmp_path)
    true_layers = Survey.layers

    def short_sighted(survey: Survey, expected: int) -> tuple[Layer, ...]:
        return tuple(replace(layer, window=9) for layer in true_layers(survey, expected))

    monkeypatch.setattr(Survey, "layers", short_sighted)
    monkeypatch.setattr("tensorweave.workers.autodeploy.loader._check_kinds", lambda config, layers: None)
    with pytest.raises(ValueError, match=r"over paged attention its logits are .* away from those of transformers"):
        load_autodeploy(args_for(tmp_path), SoloComm())


def test_wrong_files_and_arguments(tmp_path: Path) -> None:
    make("olmo2", tmp_path)
    with pytest.raises(ValueError, match="runs on one rank; tensor_parallel_size is 2"):
        args_for(tmp_path, tensor_parallel_size=2)
    rewrite_config(tmp_path, lambda fields: fields.update(num_hidden_layers=4))
    with pytest.raises(
        ValueError, match=r"the checkpoint of Olmo2ForCausalLM \(olmo2\) has missing_keys: model.layers.3"
    ):
        load_autodeploy(args_for(tmp_path), SoloComm())
    rewrite_config(tmp_path, lambda fields: fields.update(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"has unexpected_keys: model\.layers\.2"):
        load_autodeploy(args_for(tmp_path), SoloComm())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="transformers cannot load it"):
        load_autodeploy(args_for(tmp_path), SoloComm())
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ValueError, match="transformers cannot read its config"):
        check_model(args_for(tmp_path))


def test_an_engine_directory_is_of_the_other_backend(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    save_engine_dir(tmp_path / "model", tmp_path / "engine", tensor_parallel_size=1, dtype="float32")
    with pytest.raises(ValueError, match="is an engine directory; backend '_autodeploy' needs a checkpoint"):
        check_model(args_for(tmp_path / "engine"))


def test_positions_past_which_rotations_depend_on_the_batch_are_not_used(tmp_path: Path) -> None:
    rope = {
        **THETA,
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 96,
    }
    make("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=96)
    assert load_autodeploy(args_for(tmp_path), SoloComm()).info.max_seq_len == 96
    assert load_autodeploy(args_for(tmp_path, max_seq_len=50), SoloComm()).info.max_seq_len == 50
