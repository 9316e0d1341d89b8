"""A request to stop is noted once and leaves the process's signal handlers as they were."""

from __future__ import annotations

import os
import signal

import pytest

from nsa.train.stop import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_a_second_acts_as_before(number: signal.Signals) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda received, _: seen.append(received))
    try:
        with StopRequest() as stop:
            assert stop.reason is None
            os.kill(os.getpid(), number)
            assert (stop.reason, seen) == (number.name, [])
            os.kill(os.getpid(), number)
            assert (stop.reason, seen) == (number.name, [number])
    finally:
        signal.signal(number, before)


def test_without_a_signal_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert stop.reason is None
    assert [signal.getsignal(number) for number in SIGNALS] == before
