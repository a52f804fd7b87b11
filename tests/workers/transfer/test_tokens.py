"""Prefill in one gang and decode in another give the tokens of one gang that does both, whatever the ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.transfer.carriers.loop import LoopNetwork
from tests.workers.engine_drive import random_prompts
from tests.workers.tiny_models import make_model
from tests.workers.transfer.marks import EveryLayer
from tests.workers.transfer_drive import (
    Answer,
    Client,
    Gang,
    MakeCarrier,
    SharedPools,
    hash_gang,
    loop_carriers,
    model_gang,
    peer_carriers,
    run_aggregated,
    run_disaggregated,
    tcp_carriers,
)

SIZES = [(p, d) for p in (1, 2, 3) for d in (1, 2, 3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two KV heads under six: at three ranks one of them lives on two ranks."""
    path = tmp_path_factory.mktemp("model")
    make_model("llama", path)
    return path


def mixed_samplings(count: int, seed: int = 0) -> list[SamplingSpec]:
    """Greedy and seeded ones, of different lengths, some with a stop token that may come at once."""
    rng = random.Random(seed)
    return [
        SamplingSpec(
            max_tokens=rng.randint(1, 12),
            temperature=rng.choice([0.0, 0.8, 1.3]),
            top_k=rng.choice([0, 20]),
            top_p=rng.choice([1.0, 0.9]),
            seed=rng.randrange(1 << 30),
            stop_token_ids=tuple(rng.sample(range(211), 30)) if rng.random() < 0.3 else (),
        )
        for _ in range(count)
    ]


def answers_of(gang: Gang, prompts: list[list[int]], samplings: list[SamplingSpec]) -> list[tuple[list[int], Any]]:
    return [(a.tokens, a.finish_reason) for a in run_aggregated(gang, prompts, samplings)]


def check_pair(
    model: Path, sizes: tuple[int, int], carriers: MakeCarrier, want: Any, requests: Any, **knobs: Any
) -> None:
    """Twice the same requests: the second time both gangs find prefixes in their own trees."""
    with (
        model_gang(model, sizes[0], carriers, name="P", **knobs) as prefill,
        model_gang(model, sizes[1], carriers, name="D", **knobs) as decode,
    ):
        for name in ("cold", "warm"):
            answers = run_disaggregated(prefill, decode, *requests, name=name)
            assert [(a.tokens, a.finish_reason) for a in answers] == want
            prefill.wait_idle()
            decode.wait_idle()
        assert decode.failures() == {}
        assert decode.gauge("kv_transfer_recomputed_tokens_total") == 0
        assert decode.gauge("kv_transfer_blocks_total") > 0


@pytest.fixture(scope="module")
def requests() -> tuple[list[list[int]], list[SamplingSpec]]:
    prompts = [*random_prompts(5, 120), [5], [7, 8], *random_prompts(2, 600, seed=1)]
    prompts.append([*prompts[-1][:96], 1, 2, 3])
    return prompts, mixed_samplings(len(prompts))


@pytest.fixture(scope="module")
def want(model: Path, requests: Any) -> list[tuple[list[int], Any]]:
    with model_gang(model, 1, None) as gang:
        return answers_of(gang, *requests)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tcp_chunked(model: Path, sizes: tuple[int, int], want: Any, requests: Any) -> None:
    check_pair(model, sizes, tcp_carriers, want, requests, max_num_tokens=128)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (2, 3)], ids=str)
def test_tcp_whole_prompts(model: Path, sizes: tuple[int, int], want: Any, requests: Any) -> None:
    check_pair(model, sizes, tcp_carriers, want, requests, chunked=False, max_num_tokens=1024)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2)], ids=str)
def test_loop(model: Path, sizes: tuple[int, int], want: Any, requests: Any) -> None:
    check_pair(model, sizes, loop_carriers(LoopNetwork()), want, requests)


def test_layer_by_layer_from_the_sender_s_pool(model: Path) -> None:
    """Engines whose steps stay on a device offer layers as they pass them; the receiver copies them itself."""
    prompts = [*random_prompts(3, 120), [5], *random_prompts(1, 300, seed=1)]
    requests, knobs = (prompts, mixed_samplings(len(prompts))), {"is_on_device": True, "max_num_tokens": 128}
    made: list[EveryLayer] = []

    def make_marks(engine: Any) -> EveryLayer:
        made.append(EveryLayer(len(engine.pool.layers)))
        engine.tell_layers(made[-1])
        return made[-1]

    with model_gang(model, 1, None, **knobs) as gang:
        want = answers_of(gang, *requests)
    check_pair(model, (1, 1), peer_carriers(SharedPools()), want, requests, make_marks=make_marks, **knobs)
    assert made[0].num_taken > made[0].num_layers, "the prefill gang has followed its steps"


def test_without_prefix_trees(model: Path, want: Any, requests: Any) -> None:
    check_pair(model, (1, 2), tcp_carriers, want, requests, reuse=False)


def test_a_replay_longer_than_a_step_without_chunking() -> None:
    """What was generated elsewhere counts as output: it is taken in, and computed in pieces that fit a step."""
    prompt, sampling = [7 * at % 1000 for at in range(60)], SamplingSpec(max_tokens=100)
    with hash_gang(make_carrier=None, chunked=False, max_num_tokens=64) as gang:
        (whole,) = run_aggregated(gang, [prompt], [sampling])
        gang.leader.get_latest_iteration_stats()
        sent = whole.tokens[:80]
        gang.leader.enqueue_request(GenerateRequest("again", [*prompt, *sent], sampling, num_replayed=len(sent)))
        client = Client(gang)
        client.answers["again"] = Answer(tokens=list(sent))
        (answer,) = client.wait(["again"])
        assert (answer.tokens, answer.finish_reason) == (whole.tokens, "length")
        rows = gang.leader.get_latest_iteration_stats()
        assert max(row["inflightBatchingStats"]["numCtxTokens"] for row in rows) <= 64
        with pytest.raises(RequestRejected, match="limit of 64 tokens"):
            gang.leader.enqueue_request(GenerateRequest("over", [*prompt, 1, 2, 3, 4, 5], sampling))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
def test_long_prompts(model: Path, sizes: tuple[int, int], chunked: bool) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(211) for _ in range(length)] for length in (4000, 1, 2500, 33, 1024, 511, 3071)]
    requests = prompts, mixed_samplings(len(prompts), seed=3)
    knobs: dict[str, Any] = {"max_num_tokens": 512 if chunked else 4096, "chunked": chunked}
    knobs["kv_cache_config"] = {"max_tokens": 16384}
    with model_gang(model, 1, None, **knobs) as gang:
        want = answers_of(gang, *requests)
    check_pair(model, sizes, tcp_carriers, want, requests, **knobs)


def test_many_requests_over_a_full_cache() -> None:
    """More requests than blocks: fetches wait for room, decodes are paused and computed again."""
    rng = random.Random(5)
    prompts = [[rng.randrange(1000) for _ in range(rng.randint(1, 300))] for _ in range(60)]
    samplings = [SamplingSpec(max_tokens=rng.randint(1, 40)) for _ in prompts]
    with hash_gang(make_carrier=None) as gang:
        want = answers_of(gang, prompts, samplings)
    for policy in ("GUARANTEED_NO_EVICT", "MAX_UTILIZATION"):
        knobs: dict[str, Any] = {"num_blocks": 30, "tokens_per_block": 16, "policy": policy, "max_num_tokens": 64}
        with hash_gang(1, name="P", **knobs) as prefill, hash_gang(2, name="D", **knobs) as decode:
            answers = run_disaggregated(prefill, decode, prompts, samplings)
            assert [(a.tokens, a.finish_reason) for a in answers] == want
            prefill.wait_idle()
            decode.wait_idle()
