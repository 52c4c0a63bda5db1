"""Leases: one process computes, the others wait, and a dead or silent holder is found out."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from compress_search.leases import Lease, Leases, lease_files, waiting_files
from compress_search.worker_process import Worker

QUICK = {"renew_seconds": 0.05, "grace_seconds": 0.5, "poll_seconds": 0.01}


def never():
    """Find nothing, as if no process had stored the stage."""


@pytest.fixture
def said():
    return []


@pytest.fixture
def leases(tmp_path, said):
    (tmp_path / "stages").mkdir()
    return Leases(tmp_path / "stages", said.append, **QUICK)


@pytest.fixture
def write_lease(leases):
    """Write the lease of another process, and return its file."""

    def write(holder, key="key"):
        file = leases.folder / f"{key}.lease"
        file.write_text(Lease("fine_tune", holder, "another", 0.0).to_json())
        return file

    return write


def parent():
    """A process that lives, and is not this one."""
    process = psutil.Process(os.getppid())
    return Worker.of(process)


def dead():
    return dataclasses.replace(parent(), started=-1e6)


def elsewhere():
    return dataclasses.replace(parent(), host="elsewhere")


def names(leases):
    return sorted(path.name for path in leases.folder.iterdir())


def test_a_lease_says_who_holds_it_and_is_gone_with_its_block(leases, said):
    before = time.time()
    with leases.computing("key", "fine_tune", never) as found:
        assert found is None
        (seen,) = lease_files(leases.folder)
        assert (seen.key, seen.lease.what, seen.lease.holder) == ("key", "fine_tune", Worker.this_process())
        assert before <= seen.lease.since <= time.time()
        assert not seen.is_known_dead(silent_seconds=60)
    assert names(leases) == [] and said == []


def test_a_lease_is_gone_when_its_block_fails(leases):
    with pytest.raises(KeyboardInterrupt), leases.computing("key", "fine_tune", never):
        raise KeyboardInterrupt
    assert names(leases) == []


def test_what_was_stored_just_before_the_lease_is_found(leases):
    with leases.computing("key", "fine_tune", lambda: "stored") as found:
        assert found == "stored"
    assert names(leases) == []


def test_different_stages_do_not_wait_for_each_other(leases):
    with leases.computing("one", "fine_tune", never), leases.computing("two", "fine_tune", never):
        assert names(leases) == ["one.lease", "two.lease"]


def in_threads(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_of_many_who_want_a_stage_one_computes_it_and_the_others_are_told_and_get_it(leases, said):
    stored, computed, got = [], [], []

    def want():
        with leases.computing("key", "fine_tune", lambda: stored[0] if stored else None) as found:
            if found is None:
                computed.append(1)
                # Longer than the grace: the holder is not taken for dead while it renews.
                time.sleep(2 * QUICK["grace_seconds"])
                stored.append("result")
            got.append(found)

    in_threads(*[want] * 4)
    assert len(computed) == 1
    assert sorted(got, key=str) == [None, "result", "result", "result"]
    assert len(said) == 3
    assert all(
        f"Waiting for the stage key, which another process computes: fine_tune, by process {os.getpid()} on "
        in line
        for line in said
    )
    assert names(leases) == []


def test_those_who_wait_are_listed_while_they_do(leases, write_lease):
    file = write_lease(parent())
    stored, listed = [], []

    def look():
        while not (found := waiting_files(file)) or not Lease.read(found[0]):
            time.sleep(0.01)
        listed.extend(lease_files(leases.folder)[0].waiting)
        stored.append("result")

    def want():
        with leases.computing("key", "fine_tune", lambda: stored[0] if stored else None):
            pass

    in_threads(look, want)
    assert listed == [Worker.this_process()]
    assert waiting_files(file) == []


def test_the_lease_of_a_dead_process_is_taken_over_at_once(leases, write_lease, said):
    write_lease(dead())
    patient = dataclasses.replace(leases, grace_seconds=1e6)
    with patient.computing("key", "fine_tune", never) as found:
        assert found is None
        assert lease_files(leases.folder)[0].lease.holder == Worker.this_process()
    assert said[-1] == f"The stage key is taken over: {dead()} has ended."


@pytest.mark.parametrize("holder", [parent, elsewhere])
def test_a_holder_that_is_silent_for_the_grace_is_taken_over(leases, write_lease, said, holder):
    file = write_lease(holder())
    # The clock of the holder's machine is far ahead, which tells nothing.
    os.utime(file, (2**32, 2**32))
    started = time.monotonic()
    with leases.computing("key", "fine_tune", never):
        assert time.monotonic() - started >= QUICK["grace_seconds"]
    assert "gave no sign of life for" in said[-1]


def test_a_holder_elsewhere_that_renews_is_waited_for_whatever_its_clock_says(leases, write_lease, said):
    file = write_lease(elsewhere())
    stored = []

    def renew():
        for second in range(100):
            # A clock that is fifty years behind.
            os.utime(file, (second, second))
            time.sleep(2 * QUICK["grace_seconds"] / 100)
        stored.append("result")

    def want():
        with leases.computing("key", "fine_tune", lambda: stored[0] if stored else None) as found:
            stored.append(found)

    in_threads(renew, want)
    assert stored == ["result", "result"]
    assert len(said) == 1


def test_a_lease_that_cannot_be_read_runs_out(leases):
    (leases.folder / "key.lease").write_text('{"what": "fi')
    with leases.computing("key", "fine_tune", never) as found:
        assert found is None
    assert names(leases) == []


def test_who_was_taken_over_does_not_remove_the_new_holders_lease(leases, write_lease):
    with leases.computing("key", "fine_tune", never):
        file = leases.folder / "key.lease"
        file.unlink()
        write_lease(parent())
    assert Lease.read(file).token == "another"


def test_who_was_taken_over_does_not_renew_the_new_holders_lease(leases, write_lease):
    with leases.computing("key", "fine_tune", never):
        (leases.folder / "key.lease").unlink()
        file = write_lease(parent())
        os.utime(file, (5, 5))
        time.sleep(4 * QUICK["renew_seconds"])
        assert file.stat().st_mtime == 5


def test_of_many_who_find_a_dead_holder_only_one_takes_over(leases, write_lease):
    for _ in range(20):
        write_lease(dead())
        stored, inside, most = [], [], []

        def want(stored=stored, inside=inside, most=most):
            with leases.computing("key", "fine_tune", lambda: stored[0] if stored else None) as found:
                if found is None:
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.005)
                    inside.pop()
                    stored.append("result")

        in_threads(*[want] * 4)
        assert most == [1]


def test_waiting_can_be_interrupted(leases, write_lease):
    file = write_lease(parent())
    program = (
        "import pathlib, signal, sys\n"
        "from compress_search.leases import Leases\n"
        # A shell lets what it starts in the background ignore SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "leases = Leases(pathlib.Path(sys.argv[1]), lambda text: print(text, flush=True))\n"
        "with leases.computing('key', 'fine_tune', lambda: None):\n"
        "    print('taken')\n"
    )
    command = [sys.executable, "-c", program, str(leases.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b"Waiting for the stage key")
        process.send_signal(2)
        out, error = process.communicate(timeout=10)
    assert out == b"" and b"KeyboardInterrupt" in error
    assert Lease.read(file).token == "another"
    assert names(leases) == ["key.lease"]


def test_where_no_lease_can_be_made_the_work_is_done_without(leases, caplog):
    nowhere = dataclasses.replace(leases, folder=leases.folder / "gone")
    with nowhere.computing("key", "fine_tune", never) as found:
        assert found is None
    assert "another process may compute the same" in caplog.text


@pytest.mark.parametrize("call", ["write", "link"])
def test_whoever_ends_while_it_makes_a_lease_leaves_none(leases, monkeypatch, call):
    def end(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"compress_search.leases.os.{call}", end)
    with pytest.raises(KeyboardInterrupt), leases.computing("key", "fine_tune", never):
        pass
    assert names(leases) == []


def test_without_hard_links_there_are_leases_too(leases, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("compress_search.leases.os.link", refuse)
    with leases.computing("key", "fine_tune", never):
        assert Lease.read(leases.folder / "key.lease").holder == Worker.this_process()
        assert names(leases) == ["key.lease"]
    assert names(leases) == []


def test_on_a_full_disk_an_empty_lease_keeps_others_out(leases, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress_search.leases.os.write", refuse)
    with leases.computing("key", "fine_tune", never):
        assert names(leases) == ["key.lease"]
    assert "It keeps others out all the same" in caplog.text
    assert names(leases) == []


def test_one_look_tells_a_dead_lease_from_a_live_one(leases, write_lease):
    for key, holder in (("a", parent()), ("b", dead()), ("c", elsewhere()), ("d", elsewhere())):
        write_lease(holder, key)
    (leases.folder / "e.lease").write_text("")
    for key in "de":
        os.utime(leases.folder / f"{key}.lease", (1, 1))
    seen = {one.key: one.is_known_dead(silent_seconds=3600) for one in lease_files(leases.folder)}
    assert seen == {"a": False, "b": True, "c": False, "d": True, "e": True}
