"""More requests than the engine holds at a time: they wait until others end or are aborted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tensorweave import LLM, KvCacheConfig, SamplingParams
from tensorweave.cluster.errors import Overloaded
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.policy import Route
from tensorweave.router.dispatch.recovery import Recovery
from tests.llmapi.small_llm import write_small_model
from tests.router.fake_fleet import FakeLink
from tests.router.serving import model_info


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    directory = write_small_model(tmp_path_factory.mktemp("llama"))
    cache = KvCacheConfig(max_tokens=2048)
    with LLM(directory, dtype="float32", kv_cache_config=cache, max_queued_requests=4, max_batch_size=4) as made:
        yield made


def test_a_long_list_of_prompts(llm: LLM) -> None:
    prompts = [[5 + number % 300, 6, 7] for number in range(60)]
    params = SamplingParams(max_tokens=3, ignore_eos=True, n=2, temperature=1.0, seed=1)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [[one.length for one in output.outputs] for output in outputs] == [[3, 3]] * 60  # type: ignore[union-attr]
    alone = llm.generate(prompts[17], params)
    assert alone.outputs[1].token_ids == outputs[17].outputs[1].token_ids  # type: ignore[union-attr, index]


def test_what_is_aborted_makes_room(llm: LLM) -> None:
    """The engine still holds aborted requests for up to a step when the next ones come."""
    endless = SamplingParams(max_tokens=1500, ignore_eos=True)
    for _ in range(20):
        running = [llm.generate_async([9, 8, 7], endless, streaming=True) for _ in range(4)]
        next(iter(running[0]))
        waiting = [
            llm.generate_async([9, 8, number], SamplingParams(max_tokens=2, ignore_eos=True)) for number in (1, 2, 3)
        ]
        for output in running:
            output.abort()
        assert [output.result(60).outputs[0].length for output in waiting] == [2, 2, 2]
        assert {output.result(60).outputs[0].finish_reason for output in running} <= {"cancelled", "length"}


def test_a_full_gang_is_waited_for_where_that_is_wanted() -> None:
    link = FakeLink(model_info())
    full = Overloaded("16 requests are waiting or running", retry_after_s=1.0)
    patient = Recovery(Limits(waits_for_room=True))
    patient.lose(Route(None, link), full, num_sent=0)
    assert patient.left([link]) == []
    assert 0 < patient.start_over(has_begun=False) < 1
    assert patient.left([link]) == [link]
    hasty = Recovery(Limits())
    hasty.lose(Route(None, link), full, num_sent=0)
    with pytest.raises(Overloaded):
        hasty.start_over(has_begun=False)
