"""The engine against transformers' own classes and the slow twin: equal greedy ids for any split and chunking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.fakes.fake_engine import EmptyEngine, HashEngine, hash_token
from tensorweave.workers.fakes.fake_executor import fake_output
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.gang.device import has_fast_bfloat16, pick_device, pick_dtype
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.resources import BlockCopy
from tests.workers.engine_drive import (
    ScatteredBlocks,
    engine_args,
    generate,
    generate_on_ranks,
    logits_of,
    make_request,
    random_prompts,
    run_ranks,
)
from tests.workers.plain_forward import PlainModel
from tests.workers.tiny_models import DENSE, MIXTURES, MODELS, VOCAB, make_model, their_greedy

LONG = pytest.mark.long("takes a minute")
PROMPTS = [*random_prompts(5, 90), [7], [5] * 32, list(range(100, 133))]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    expected = their_greedy(model, PROMPTS, 12)
    assert generate_on_ranks(tmp_path, 1, PROMPTS, 12, chunk=24) == expected
    assert generate_on_ranks(tmp_path, 2, PROMPTS, 12, chunk=1000) == expected


@pytest.mark.parametrize("name", MIXTURES)
def test_ranks_may_have_different_experts(name: str, tmp_path: Path) -> None:
    make_model(name, tmp_path)
    expected = generate_on_ranks(tmp_path, 1, PROMPTS, 12)
    for size, expert in ((2, 2), (3, 3), (4, 2)):
        assert generate_on_ranks(tmp_path, size, PROMPTS, 12, chunk=50, expert=expert) == expected


@pytest.mark.parametrize(
    ("name", "size"),
    [*(("llama_tied_9_over_3", size) for size in (2, 3, 4, 5, 9)), ("llama_8_over_2", 3), ("llama_8_over_2", 5)],
)
def test_heads_that_do_not_divide_run_at_any_size(name: str, size: int, tmp_path: Path) -> None:
    make_model(name, tmp_path)
    plain = PlainModel(tmp_path)
    expected = [plain.greedy(prompt, 8) for prompt in PROMPTS]
    assert generate_on_ranks(tmp_path, size, PROMPTS, 8, chunk=40) == expected


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunks_of_a_prompt_change_nothing(chunk: int, tmp_path: Path) -> None:
    make_model("mistral_window", tmp_path)
    plain = PlainModel(tmp_path)
    assert generate_on_ranks(tmp_path, 1, PROMPTS, 6, chunk=chunk) == [plain.greedy(prompt, 6) for prompt in PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["llama", "mistral_window", "qwen2", "qwen3", *(pytest.param(name, marks=LONG) for name in MIXTURES)]
)
def test_long_prompts_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    prompts = random_prompts(50, 3000, seed=1)
    expected = their_greedy(model, prompts, 8)
    knobs: dict[str, Any] = {"kv_cache_config": {"max_tokens": 50 * 3072}}
    for size in (1, 2):
        assert generate_on_ranks(tmp_path, size, prompts, 8, chunk=512, **knobs) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", DENSE)
def test_greedy_ids_on_a_gpu_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    expected = their_greedy(model, PROMPTS, 12)
    assert generate_on_ranks(tmp_path, 1, PROMPTS, 12, chunk=24, device="cuda") == expected


def test_logits_are_close_to_those_of_transformers(tmp_path: Path) -> None:
    model = make_model("qwen3_yarn", tmp_path)
    prompt = random_prompts(1, 300, seed=3)[0]
    engine = load_engine(engine_args(tmp_path), SoloComm())
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    batch = ScheduledBatch((StepRow.of_context(make_request(0, prompt), 0, len(prompt)),))
    logits = logits_of(engine, batch, resources)
    with torch.no_grad():
        theirs = model(torch.tensor([prompt])).logits[0, -1:]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, theirs, atol=2e-4, rtol=1e-4)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    make_model("qwen3", tmp_path, initializer_range=0.05)
    prompt = random_prompts(1, 200, seed=4)[0]

    def last_logits(dtype: str) -> torch.Tensor:
        engine = load_engine(engine_args(tmp_path, dtype=dtype), SoloComm())
        resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
        return logits_of(
            engine, ScheduledBatch((StepRow.of_context(make_request(0, prompt), 0, len(prompt)),)), resources
        )

    wide, narrow = last_logits("float32"), last_logits("bfloat16")
    assert narrow.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(wide, narrow).item() > 0.999


def test_a_middle_chunk_gives_no_logits_and_logits_may_be_edited(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    engine = load_engine(engine_args(tmp_path), SoloComm())
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    first, second = make_request(0, PROMPTS[0]), make_request(1, [3, 4, 5])
    batch = ScheduledBatch((StepRow.of_context(first, 0, len(PROMPTS[0]) - 1), StepRow.of_context(second, 0, 3)))
    logits = logits_of(engine, batch, resources)
    assert logits.shape == (1, VOCAB)
    logits[:, 2] = float("-inf")
    assert logits_of(engine, ScheduledBatch((StepRow.of_context(first, 0, 5),)), resources).shape == (0, VOCAB)


def test_a_copied_block_serves_as_its_source(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    engine = load_engine(engine_args(tmp_path), SoloComm())
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    prompt = random_prompts(1, 30, seed=5)[0][:13] + [1] * 13
    one, other = make_request(0, prompt), make_request(1, [*prompt[:10], 9, 8, 7])
    logits_of(engine, ScheduledBatch((StepRow.of_context(one, 0, len(prompt)),)), resources)
    resources.copies.append(BlockCopy(resources.block_ids(one)[0], resources.block_ids(other)[0], 10))
    reused = logits_of(engine, ScheduledBatch((StepRow.of_context(other, 10, 3),)), resources)
    alone = logits_of(engine, ScheduledBatch((StepRow.of_context(make_request(2, other.tokens), 0, 13),)), resources)
    torch.testing.assert_close(reused, alone, atol=1e-4, rtol=1e-4)


def test_ranks_take_the_smallest_kv_pool_and_say_what_they_run(tmp_path: Path) -> None:
    make_model("llama_tied_9_over_3", tmp_path)
    infos = run_ranks(
        2, lambda comm: load_engine(engine_args(tmp_path, kv_cache_config={"max_tokens": 100}), comm).info
    )
    assert infos[0] == infos[1]
    info = infos[0]
    assert (info.num_blocks, info.tokens_per_block, info.max_seq_len) == (7, 16, 112)
    assert (info.vocab_size, info.dtype, info.end_ids) == (VOCAB, "float32", (2,))
    sizes = load_model_config(tmp_path).sizes
    assert info.kv_bytes_per_token == 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * 4


def test_a_memory_fraction_sizes_the_pool(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    args = engine_args(tmp_path, kv_cache_config={"max_tokens": None, "cpu_memory_fraction": 0.0005}, max_seq_len=77)
    info = load_engine(args, SoloComm()).info
    assert info.num_blocks > 10
    assert info.max_seq_len == 77


def test_a_length_that_cannot_be_had_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model("llama", tmp_path)
    limit = load_model_config(tmp_path).max_seq_len
    for max_tokens, got, cause in (
        (2 * limit, limit, "the model's own limit"),
        (64, 64, "the KV cache has no room for more"),
    ):
        caplog.clear()
        args = engine_args(tmp_path, kv_cache_config={"max_tokens": max_tokens}, max_seq_len=limit + 1)
        assert load_engine(args, SoloComm()).info.max_seq_len == got
        assert caplog.messages == [f"max_seq_len is {got} instead of {limit + 1}: {cause}"]


def test_a_kv_cache_larger_than_memory_is_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    with pytest.raises(ValueError, match=r"max_tokens is 1000000000000, which takes .* GiB are free"):
        load_engine(engine_args(tmp_path, kv_cache_config={"max_tokens": 10**12}), SoloComm())


def test_more_ranks_than_heads_are_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    with pytest.raises(ValueError, match="tensor_parallel_size is 7; this model has 6 attention heads"):
        run_ranks(7, lambda comm: load_engine(engine_args(tmp_path), comm))


def test_dummy_weights_are_the_same_for_every_split(tmp_path: Path) -> None:
    make_model("qwen2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    one = generate_on_ranks(tmp_path, 1, PROMPTS[:3], 5, load_format="dummy")
    assert generate_on_ranks(tmp_path, 2, PROMPTS[:3], 5, load_format="dummy") == one


def test_auto_dtype(tmp_path: Path) -> None:
    cpu = pick_device("cpu")
    assert pick_dtype("auto", "float16", cpu) == torch.float32
    assert pick_dtype("bfloat16", "float32", cpu) == torch.bfloat16
    assert pick_dtype("auto", "bfloat16", torch.device("cuda")) == torch.bfloat16
    flags = tmp_path / "cpuinfo"
    flags.write_text("processor : 0\nflags\t\t: fpu avx2 avx512_bf16\n")
    assert has_fast_bfloat16(flags)
    flags.write_text("processor : 0\nflags\t\t: fpu avx2 avx512f\n")
    assert not has_fast_bfloat16(flags)


def test_hash_engine_reads_its_context_through_blocks() -> None:
    engine = HashEngine(num_blocks=400, tokens_per_block=8)
    prompts = random_prompts(12, 60)
    answers = generate(engine, prompts, 9, chunk=13)
    assert answers == [fake_output(prompt, 9, engine.info.vocab_size) for prompt in prompts]
    assert answers[0][0] == hash_token(prompts[0], engine.info.vocab_size)


def test_hash_engine_notices_a_foreign_block() -> None:
    engine = HashEngine(num_blocks=16, tokens_per_block=4)
    resources: Any = ScatteredBlocks(16, 4)
    request = make_request(0, list(range(10)))
    batch = ScheduledBatch((StepRow.of_context(request, 0, 10),))
    right = logits_of(engine, batch, resources).argmax()
    resources.copies.append(BlockCopy(resources.block_ids(request)[2], resources.block_ids(request)[0], 4))
    assert logits_of(engine, ScheduledBatch((StepRow.of_context(request, 9, 1),)), resources).argmax() != right


def test_empty_engine_costs_nothing_but_answers_each_row() -> None:
    resources: Any = ScatteredBlocks(16, 4)
    resources.copies.append(BlockCopy(0, 1, 2))
    rows = tuple(StepRow.of_decode(make_request(i, [1, 2])) for i in range(3))
    assert logits_of(EmptyEngine(), ScheduledBatch((), rows), resources).shape == (3, 8)
    assert resources.copies == []
