"""A rank reads the vocabulary when the first guide comes, or with its start, where that is asked for."""

from __future__ import annotations

import pytest

from tensorweave.cluster.errors import NotReady
from tensorweave.workers.gang.report_channel import LocalReportChannel
from tensorweave.workers.guided.guides import RankGuides
from tensorweave.workers.guided.orders import GuideOrder
from tensorweave.workers.guided.trials import Trials
from tensorweave.workers.guided.vocabulary import TokenizerSource, Vocabulary
from tests.router.small_tokenizers import byte_level
from tests.workers.guided.vocabularies import SIZE, end_id, vocabulary
from tests.workers.waiting import wait_until


class NotedTrials(Trials):
    """Without a process."""

    def __init__(self) -> None:
        rust = byte_level().backend.backend_tokenizer
        super().__init__(TokenizerSource("", json=rust.to_str(), end_id=end_id()), SIZE)
        self.num_read = 0

    def vocabulary(self) -> Vocabulary:
        if self._is_closed:
            raise NotReady("closed")
        self.num_read += 1
        return vocabulary()

    @property
    def is_closed(self) -> bool:
        return self._is_closed


class NoInbox:
    def release(self, hold: bytes) -> None:
        raise AssertionError(hold)

    def put_guide_order(self, order: GuideOrder) -> None:
        raise AssertionError(order)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_may_read_the_vocabulary_early_and_rank_0_alone_keeps_the_process(rank: int) -> None:
    trials = NotedTrials()
    guides = RankGuides(rank, 2, trials, LocalReportChannel(), loads_early=True)
    assert trials.num_read == 0
    guides.start(NoInbox(), lambda guide, error: None)
    wait_until(lambda: trials.num_read == 1 and trials.is_closed == bool(rank))
    guides.follow([GuideOrder("load")])  # as with the first guide
    guides.shutdown()
    assert trials.num_read == 1


def test_a_rank_waits_for_the_first_guide_otherwise() -> None:
    trials = NotedTrials()
    guides = RankGuides(0, 1, trials, LocalReportChannel())
    guides.start(NoInbox(), lambda guide, error: None)
    guides.shutdown()
    assert trials.num_read == 0
