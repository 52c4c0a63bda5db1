"""Progress as log lines and as bars."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from compress_search import progress as progress_module
from compress_search.progress import Progress


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.INFO, logger="compress_search")
    return caplog


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told to go on."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def test_every_unit_is_logged_with_the_time_left(logged, clock):
    with Progress().bar("epochs", 4) as advance:
        clock[0] += 30
        advance("accuracy 0.9")
        clock[0] += 30
        advance("accuracy 0.95")
    assert logged.messages == [
        "epochs 1/4: accuracy 0.9 (about 1 min 30 s left)",
        "epochs 2/4: accuracy 0.95 (about 1 min 00 s left)",
    ]


def test_units_done_before_count_but_say_nothing_of_the_speed(logged, clock):
    with Progress().bar("trials", 10, done=7) as advance:
        clock[0] += 5
        advance("trial 7")
    assert logged.messages == ["trials 8/10: trial 7 (about 10.0 s left)"]


def test_without_a_terminal_nothing_is_drawn(logged):
    console = Console(file=io.StringIO(), force_terminal=False)
    progress = Progress(console)
    with progress.bar("epochs", 1) as advance:
        progress.say("a fact")
        advance("done")
    assert console.file.getvalue() == ""
    assert logged.messages[0] == "a fact"


def test_bars_are_nested_and_end(logged):
    console = terminal()
    progress = Progress(console)
    with progress.bar("trials", 1) as advance_trial:
        with progress.bar("epochs", 2) as advance_epoch:
            advance_epoch("accuracy 0.9")
            progress.say("a fact [not markup]")
        assert progress._rich is not None
        advance_trial("trial 0")
    assert progress._rich is None
    drawn = console.file.getvalue()
    assert "trials" in drawn
    assert "epochs" in drawn
    assert "a fact [not markup]" in drawn
    assert [message.split(" (")[0] for message in logged.messages] == [
        "epochs 1/2: accuracy 0.9",
        "a fact [not markup]",
        "trials 1/1: trial 0",
    ]


def test_a_bar_ends_with_an_error_too():
    progress = Progress(terminal())
    with pytest.raises(ZeroDivisionError), progress.bar("epochs", 2):
        raise ZeroDivisionError
    assert progress._rich is None
