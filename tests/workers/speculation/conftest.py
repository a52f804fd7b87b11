"""A drafter of a test has the time that it needs: a pause of the machine is not taken for one that is stuck."""

from __future__ import annotations

import pytest

from tensorweave.workers.speculation.user_drafter import UserDrafter
from tests.workers.waiting import WAIT_S


@pytest.fixture(autouse=True)
def _patient_drafters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UserDrafter.__init__, "__defaults__", (WAIT_S,))
