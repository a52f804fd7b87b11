"""A signal ends the wait, whatever handler Ray has installed meanwhile."""

from __future__ import annotations

import os
import signal

import pytest

from tensorweave.deploy.stop_signal import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_wait(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.wait(0)
        signal.signal(number, signal.SIG_IGN)  # as ray.init does with some
        stop.arm()
        os.kill(os.getpid(), number)
        assert stop.wait(60)
        assert stop.received is number
        assert signal.getsignal(number) == before, "a second signal acts as before"
    assert signal.getsignal(number) == before
