"""A full disk is waited out."""

from __future__ import annotations

import errno

import pytest

from compress_search.disk_space import write_when_there_is_room


def test_what_finds_no_room_is_tried_again_and_told_once(tmp_path):
    answers = [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), None]
    said, waited = [], []

    def write():
        answer = answers.pop(0)
        if answer:
            raise answer

    write_when_there_is_room(write, tmp_path, say=said.append, sleep=waited.append)
    assert answers == [] and len(waited) == 2
    assert "is full" in said[0] and "make room" in said[0]
    assert said[1:] == ["There is room on the disk again."]


def test_other_faults_are_not_waited_for(tmp_path):
    def write():
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        write_when_there_is_room(write, tmp_path, say=pytest.fail, sleep=pytest.fail)


def test_a_writer_that_succeeds_is_called_once_and_says_nothing(tmp_path):
    calls = []
    write_when_there_is_room(lambda: calls.append(1), tmp_path, say=pytest.fail, sleep=pytest.fail)
    assert calls == [1]


def test_stopping_ends_the_waiting(tmp_path):
    def write():
        raise OSError(errno.ENOSPC, "full")

    def interrupted(seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_when_there_is_room(write, tmp_path, say=lambda text: None, sleep=interrupted)
