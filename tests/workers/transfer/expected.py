"""The answers that disaggregated requests must get, whatever happens to their transfers."""

from __future__ import annotations

from collections.abc import Sequence

from tensorweave.cluster.protocol import GenerateRequest, KvSource, SamplingSpec
from tensorweave.workers.fakes.fake_engine import hash_token
from tests.workers.transfer_drive import Client, Gang, request_pair
from tests.workers.waiting import WAIT_S


def expected_tokens(prompt: Sequence[int], num_tokens: int, vocab_size: int = 1000) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(hash_token(tokens, vocab_size))
    return tokens[len(prompt) :]


def one_request(name: str, source: KvSource, length: int = 100) -> tuple[GenerateRequest, GenerateRequest]:
    prompt = [(7 * at + len(name)) % 1000 for at in range(length)]
    return request_pair(name, prompt, SamplingSpec(max_tokens=5), source)


def check_computed_locally(decode: Gang, for_decode: GenerateRequest, kind: str, within_s: float = WAIT_S) -> None:
    """The decode gang computes the prompt itself, before the fetch's deadline, and counts the reason."""
    (answer,) = Client(decode).wait([for_decode.request_id], within_s)
    assert "timeout" not in decode.failures()
    assert answer.tokens == expected_tokens(for_decode.prompt_token_ids, 5)
    assert decode.failures()[kind] >= 1
    assert decode.gauge("kv_transfer_recomputed_tokens_total") > 0
    decode.wait_idle()
