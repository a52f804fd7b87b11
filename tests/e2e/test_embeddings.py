"""Embeddings of prompts: the last hidden state at the last token, as transformers computes it, however it is served."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tests.workers.tiny_models import VOCAB, make_model
from tests.workers.transfer_drive import Gang, hash_gang, model_gang
from tests.workers.waiting import WAIT_S

SPEC = SamplingSpec(max_tokens=1, wants_embedding=True)
TOLERANCE = 1e-5
SHARED = list(range(5, 70))
_draw = random.Random(3)
PROMPTS = [[_draw.randrange(VOCAB) for _ in range(length)] for length in (1, 2, 31, 32, 33, 64, 200)]
PROMPTS += [[*SHARED, 7], [*SHARED, 9, 11], SHARED]


def theirs(model: PreTrainedModel, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        hidden_TD = model.base_model(torch.tensor([list(prompt)])).last_hidden_state[0]
    vector: npt.NDArray[np.float32] = hidden_TD[-1].float().numpy()
    return vector / np.linalg.norm(vector)


def ours(gang: Gang, requests: Sequence[GenerateRequest]) -> list[npt.NDArray[np.float32]]:
    gang.leader.enqueue_requests(requests)
    told: dict[str, npt.NDArray[np.float32]] = {}
    num_open = len(requests)
    while num_open:
        chunks = gang.leader.await_responses(timeout_s=WAIT_S)
        assert chunks, "nothing comes"
        for chunk in chunks:
            assert chunk.error is None, chunk.error
            if chunk.context_logits:
                assert chunk.request_id not in told
                told[chunk.request_id] = np.frombuffer(chunk.context_logits, "<f4")
            num_open -= chunk.is_last
    vectors = [told[request.request_id] for request in requests if request.sampling.wants_embedding]
    return [vector / np.linalg.norm(vector) for vector in vectors]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"size": 2},
        {"max_num_tokens": 32},
        {"overlaps": True},
        {"policy": "MAX_UTILIZATION", "kv_cache_config": {"max_tokens": 512}},
    ],
    ids=["one rank", "two ranks", "chunks of a block", "overlap", "little room"],
)
def test_embeddings_equal_those_of_transformers(name: str, way: dict[str, Any], tmp_path: Path) -> None:
    expected = [theirs(make_model(name, tmp_path), prompt) for prompt in PROMPTS]
    with model_gang(tmp_path, way.pop("size", 1), None, **way) as gang:
        for turn in range(2):  # then with their blocks in the cache
            asked = [GenerateRequest(f"{turn}-{i}", prompt, SPEC) for i, prompt in enumerate(PROMPTS)]
            free = GenerateRequest(f"{turn}-free", PROMPTS[3], SamplingSpec(20))  # decodes beside them
            for told, vector in zip(ours(gang, [free, *asked]), expected, strict=True):
                np.testing.assert_allclose(told, vector, atol=TOLERANCE)
        gang.wait_idle()


def test_a_model_that_was_saved_without_its_head(tmp_path: Path) -> None:
    expected = theirs(make_model("llama_tied_9_over_3", tmp_path), PROMPTS[3])
    file = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    with model_gang(tmp_path, 1, None) as gang:
        np.testing.assert_allclose(ours(gang, [GenerateRequest("r", PROMPTS[3], SPEC)])[0], expected, atol=TOLERANCE)


def test_an_engine_without_embeddings_refuses_them() -> None:
    with hash_gang(1, None) as gang, pytest.raises(RequestRejected, match="no embeddings"):
        gang.leader.enqueue_request(GenerateRequest("r", [5], SPEC))
