"""Prefill in one gang and decode in another tells what one gang that does both tells: text, tokens, log-probabilities,
usage and cached tokens, over tcp, whatever the ranks, chunked or not, with cold and warm caches.

A few dozen requests on a small random model always; with TENSORWEAVE_TEST_LONG=1, 300 requests for every pair of sizes:
240 on small random models, 60 on SmolLM2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tensorweave.router.text.tokens import Tokenizer
from tensorweave.workers.store.model_store import resolve_model
from tests.e2e.equality_drive import TOLERANCE, Ask, Told, differences, make_asks, run
from tests.router.small_tokenizers import byte_level
from tests.workers.tiny_models import VOCAB, make_model
from tests.workers.transfer_drive import Gang, model_gang, tcp_carriers

SIZES = [(p, d) for p in (1, 2, 3) for d in (1, 2, 3)]
LETTERS = [chr(code) for code in range(ord("!"), ord("~"))]
PATIENCE_S = 600.0  # of a fetch and a lease: nothing may be recomputed because the machine is busy
LONG = pytest.mark.long("takes about an hour")


def make_gang(path: Path, size: int, chunked: bool, name: str, make_carrier: Any = tcp_carriers) -> Gang:
    """Room for every prompt, so that no cache is ever full."""
    kv = {"max_tokens": 150_000 if path.name != "smollm2" else 40_000}
    return model_gang(
        path,
        size,
        make_carrier,
        name=name,
        chunked=chunked,
        max_num_tokens=512 if chunked else 4096,
        kv_cache_config=kv,
        timeout_s=PATIENCE_S,
        lease_s=PATIENCE_S,
    )


def tell_aggregated(path: Path, asks: Sequence[Ask], tokenizer: Tokenizer, size: int = 1) -> list[dict[str, Told]]:
    with make_gang(path, size, True, "A", None) as gang:
        return [run(asks, tokenizer, gang), run(asks, tokenizer, gang)]


def check(
    path: Path,
    sizes: tuple[int, int],
    chunked: bool,
    asks: Sequence[Ask],
    tokenizer: Tokenizer,
    want: list[dict[str, Told]],
    tolerance: float = TOLERANCE,
) -> None:
    with (
        make_gang(path, sizes[0], chunked, "P") as prefill,
        make_gang(path, sizes[1], chunked, "D") as decode,
    ):
        for caches, expected in zip(("cold", "warm"), want, strict=True):
            told = run(asks, tokenizer, decode, prefill)
            assert differences(expected, told, tolerance) == []
            prefill.wait_idle(30.0)
            decode.wait_idle(30.0)
            num_tokens = sum(len(one.token_ids) for one in told.values())
            num_told = sum(len(one.logprobs) for one in told.values())
            print(
                f"{path.name} {sizes} {'chunked' if chunked else 'whole'} {caches}: {len(asks)} requests, {len(told)} "
                f"sequences, {num_tokens} tokens, {num_told} with log-probabilities: all the same"
            )
        # Where the first token was the last, nobody needs the KV any more: a fetch on its way finds it gone, or its end
        # without all its blocks, or its blocks come when the request has ended, or belong to another prompt by the time
        # the socket reads them, which their digest shows.
        failures = decode.failures()
        assert failures.keys() <= {"gone", "missing", "late", "digest"}
        assert "digest" not in failures or "gone" in failures
        assert failures or decode.gauge("kv_transfer_recomputed_tokens_total") == 0
        assert decode.gauge("kv_transfer_blocks_total") > 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    path.mkdir()
    make_model("llama", path)
    return path


@pytest.fixture(scope="module")
def few() -> list[Ask]:
    return make_asks(16, 1, VOCAB, 300, LETTERS)


@pytest.fixture(scope="module")
def few_told(llama: Path, few: list[Ask]) -> list[dict[str, Told]]:
    return tell_aggregated(llama, few, byte_level())


def test_the_requests_are_of_every_kind(few: list[Ask], few_told: list[dict[str, Told]]) -> None:
    cold, warm = few_told
    assert {ask.n for ask in few} == {1, 2, 3}
    assert {told.finish_reason for told in cold.values()} == {"stop", "length"}
    assert any(isinstance(told.stop_reason, str) for told in cold.values())
    assert any(told.logprobs for told in cold.values())
    assert any(told.prompt_logprobs for told in cold.values())
    assert any(told.num_cached for told in warm.values())


@pytest.mark.parametrize(
    ("sizes", "chunked"), [((1, 1), True), ((3, 2), True), ((2, 3), False), ((1, 2), True)], ids=str
)
def test_a_few(
    llama: Path, few: list[Ask], few_told: list[dict[str, Told]], sizes: tuple[int, int], chunked: bool
) -> None:
    check(llama, sizes, chunked, few, byte_level(), few_told)


# ---- at full size

SMALL = ("llama", "llama_tied_9_over_3", "qwen3", "mistral_window", "qwen3_moe")


@LONG
@pytest.mark.parametrize("name", SMALL)
def test_small_models_at_full_size(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir()
    make_model(name, path)
    asks = make_asks(60, 7, VOCAB, 4000, LETTERS)
    want = tell_aggregated(path, asks, byte_level())
    for sizes in SIZES:
        for chunked in (True, False):
            check(path, sizes, chunked, asks, byte_level(), want)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "smollm2"
    path.symlink_to(resolve_model("smollm2-135m-instruct"))
    return path


def smollm2_asks() -> list[Ask]:
    return make_asks(60, 11, 49_000, 4000, [" the", ".", ",", " a", " of", "\n", " to", "s"], most=8)


@LONG
@pytest.mark.model
@pytest.mark.parametrize("size", [1, 2, 3])
def test_smollm2_at_full_size(smollm2: Path, size: int) -> None:
    """Against the aggregated engine with as many ranks as the decode gang. Where the prefill gang has another number,
    sums are in another order, which moves this model's float32 log-probabilities by up to some 1e-4."""
    tokenizer, asks = Tokenizer.load(smollm2), smollm2_asks()
    want = tell_aggregated(smollm2, asks, tokenizer, size)
    for prefill_size in (1, 2, 3):
        tolerance = TOLERANCE if prefill_size == size else 2e-3
        for chunked in (True, False):
            check(smollm2, (prefill_size, size), chunked, asks, tokenizer, want, tolerance)
