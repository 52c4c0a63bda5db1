"""Signals: the first may wait for the step that runs, the second never does."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from compress_search.stopping import StopSwitch

both_signals = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def send(number):
    os.kill(os.getpid(), number)


@both_signals
def test_outside_of_a_step_it_stops_at_once(number):
    stop = StopSwitch()
    with pytest.raises(KeyboardInterrupt), stop.on_signals():
        send(number)
    assert stop.requested


@both_signals
def test_within_a_step_the_first_waits_and_the_second_does_not(number):
    stop, reached = StopSwitch(), []

    def step():
        send(number)
        reached.append(stop.requested)
        send(number)
        reached.append("more")

    with pytest.raises(KeyboardInterrupt), stop.on_signals(), stop.finishing():
        step()
    assert reached == [True]


def test_the_handlers_are_put_back(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSwitch().on_signals():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_earlier_request_does_not_stop_the_next_run():
    stop = StopSwitch()
    with stop.on_signals(), stop.finishing():
        send(signal.SIGINT)
    with stop.on_signals():
        assert not stop.requested


def test_outside_of_the_main_thread_nothing_changes():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with StopSwitch().on_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
