"""docs/scheduler.md and docs/kv_cache_manager.md are true: their classes load by name and serve, their scripts run."""

from __future__ import annotations

import contextlib
import importlib
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.executor.dry_run import DryRun, PlanError
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.resources import ResourceManager

DOCS = Path(__file__).parents[3] / "docs"
KNOBS: dict[str, Any] = {
    "policy": "GUARANTEED_NO_EVICT",
    "max_batch_size": 4,
    "max_num_tokens": 16,
    "enable_chunked_prefill": True,
    "chunking_policy": "FIRST_COME_FIRST_SERVED",
}


@pytest.fixture
def _docs_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each code block of the two pages as the file that its first line names."""
    names = []
    for page in ("scheduler.md", "kv_cache_manager.md"):
        for block in re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL):
            name = re.match(r"# (\w+)\.py\n", block)
            assert name, f"{page}: a code block does not name its file"
            names.append(name.group(1))
            (tmp_path / f"{name.group(1)}.py").write_text(block)
    assert len(set(names)) == len(names) == 6
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for module in names:
        sys.modules.pop(module, None)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _play(kv: Any, scheduler: Any) -> DryRun:
    """Sixty requests, some with equal beginnings, arriving in the middle of others, some cancelled."""
    draw = random.Random(0)
    loop = DryRun(ResourceManager([kv]), scheduler, max_batch_size=4, max_num_tokens=16, vocab_size=4)
    for order in range(60):
        prompt = draw.choice([[1, 2, 3, 4, 5, 6], [], [1, 2, 3]]) + draw.choices(range(4), k=draw.randint(1, 20))
        max_tokens = draw.randint(1, 20)
        scheduler.check(len(prompt), max_tokens)
        loop.add(LlmRequest(f"r{order}", order, prompt, len(prompt), SamplingSpec(max_tokens)))
        for _ in range(draw.randint(0, 6)):
            loop.step()
        if loop.active and draw.random() < 0.1:
            loop.cancel(draw.choice(loop.active))
    loop.run()
    assert len(loop.finished) == 60
    return loop


@pytest.mark.usefixtures("_docs_on_path")
@pytest.mark.parametrize("path", ["my_schedulers:ShortestPromptFirst", "my_whole_scheduler:ReserveAll"])
def test_a_scheduler_of_the_page_serves(path: str) -> None:
    kv = KVCacheManager(num_blocks=16, tokens_per_block=4)
    scheduler = _load(path)(kv, **KNOBS)
    _play(kv, scheduler)
    with pytest.raises(RequestRejected):
        scheduler.check(60, 10)


@pytest.mark.usefixtures("_docs_on_path")
@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"])
@pytest.mark.parametrize("path", ["my_kv_cache:KeepPrompts", "my_whole_kv_cache:PlainKVCache"])
def test_a_kv_cache_of_the_page_serves(path: str, policy: str) -> None:
    kv = _load(path)(num_blocks=16, tokens_per_block=4, enable_block_reuse=True, enable_partial_reuse=True)
    _play(kv, SimpleScheduler(kv, **{**KNOBS, "policy": policy}))


@pytest.mark.usefixtures("_docs_on_path")
def test_the_pages_scripts_run(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("try_my_scheduler")
    assert capsys.readouterr().out.startswith("['request-2', 'request-1', 'request-0'] in ")
    importlib.import_module("try_my_kv_cache")
    preemptions = re.fullmatch(r"6 requests, (\d+) preemptions, \d+ steps\n", capsys.readouterr().out)
    assert preemptions
    assert int(preemptions.group(1)) > 0


class _Careless(SimpleScheduler):
    """Breaks one rule: the name of the attribute says which."""

    rule = ""

    def schedule_request(self, active: Any) -> ScheduledBatch:
        batch = super().schedule_request(active)
        if self.rule == "idles":
            return ScheduledBatch()
        if self.rule == "skips a token":
            return ScheduledBatch(tuple(StepRow.of_context(c.request, c.start, c.length + 1) for c in batch.context))
        if self.rule == "plans twice":
            return ScheduledBatch(batch.context * 2, batch.generation)
        return ScheduledBatch(batch.context, tuple(map(StepRow.of_decode, active)))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("idles", "nothing runs"),
        ("skips a token", "wrong chunk"),
        ("plans twice", "planned twice"),
        ("decodes all", "planned twice"),
    ],
)
def test_a_dry_run_says_which_rule_is_broken(rule: str, message: str) -> None:
    kv = KVCacheManager(num_blocks=16, tokens_per_block=4)
    scheduler = _Careless(kv, **KNOBS)
    scheduler.rule = rule
    with pytest.raises(PlanError, match=message):
        _play(kv, scheduler)


def test_a_dry_run_sees_kv_that_is_shared_wrongly() -> None:
    class ForgetsSalts(KVCacheManager):
        def _match(self, request: LlmRequest, limit: int) -> Any:
            return self._tree.match(request.tokens, limit, None)

    kv = ForgetsSalts(num_blocks=16, tokens_per_block=4)
    loop = DryRun(ResourceManager([kv]), SimpleScheduler(kv, **KNOBS), max_batch_size=4, max_num_tokens=16)
    for order, salt in enumerate([None, "secret"]):
        loop.add(LlmRequest(f"r{order}", order, [1] * 9, 9, SamplingSpec(1), cache_salt=salt))
        with pytest.raises(PlanError, match="another's KV") if salt else contextlib.nullcontext():
            loop.run()


def test_a_dry_run_sees_a_block_that_is_exchanged_in_place() -> None:
    class OneListEach(KVCacheManager):
        def block_ids(self, request: LlmRequest) -> list[int]:
            table = lists.setdefault(request.order, [])
            table[:] = super().block_ids(request)
            return table

    lists: dict[int, list[int]] = {}
    kv = OneListEach(num_blocks=16, tokens_per_block=4)
    loop = DryRun(ResourceManager([kv]), SimpleScheduler(kv, **KNOBS), max_batch_size=4, max_num_tokens=16)
    for order in range(2):
        loop.add(LlmRequest(f"r{order}", order, [1] * 6, 6, SamplingSpec(4)))
    with pytest.raises(PlanError, match="in the same list"):
        loop.run()
