"""Limits that depend on each other."""

from __future__ import annotations

import pytest

from tensorweave.deploy.config_tables import LimitsConfig


@pytest.mark.parametrize(
    ("max_inflight", "max_queued", "expected"), [(512, 1024, 256), (4, 0, 4), (4, 8, 12), (1, 0, 1), (256, 0, 256)]
)
def test_a_request_has_no_more_sequences_than_there_is_room_for(
    max_inflight: int, max_queued: int, expected: int
) -> None:
    limits = LimitsConfig(max_inflight=max_inflight, max_queued=max_queued).router_limits()
    assert limits.max_sequences == expected
