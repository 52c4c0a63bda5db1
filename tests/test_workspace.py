"""What is written appears whole or not at all."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compress_search.exceptions import WorkspaceError
from compress_search.workspace import (
    INTERNAL_NAMES,
    Workspace,
    new_folder,
    remove_folder,
    write_bytes_atomically,
    write_json_atomically,
    write_text_atomically,
)


def test_a_prepared_workspace_is_there_and_empty(tmp_path):
    workspace = Workspace(tmp_path / "deep" / "runs").prepare()
    assert [path.name for path in workspace.root.iterdir()] == ["stages"]
    assert list(workspace.stages.iterdir()) == []
    assert workspace.prepare() is workspace
    assert workspace.database.parent == workspace.study_folder("digits").parent == workspace.root


def test_no_study_can_be_called_as_anything_of_the_workspaces_own(tmp_path):
    workspace = Workspace(tmp_path)
    own = (getattr(workspace, name) for name, value in vars(Workspace).items() if isinstance(value, property))
    assert {path.name for path in own if isinstance(path, Path) and path.parent == tmp_path} == set(
        INTERNAL_NAMES
    )


def test_an_unwritable_workspace_is_refused_with_the_remedy(tmp_path):
    # A path below a regular file cannot be written by root either.
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match=r"cannot be written .*workspace=DIR, after `compress"):
        Workspace(tmp_path / "file" / "runs").prepare()


def test_a_workspace_is_checked_and_nothing_is_left_behind(tmp_path):
    Workspace(tmp_path / "deep" / "runs").check()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match=r"cannot be written .*workspace=DIR, after `compress"):
        Workspace(tmp_path / "file" / "runs").check()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_removed_folder_is_gone_and_leaves_nothing(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "file").write_text("")
    for _ in range(2):
        remove_folder(tmp_path / "folder")
        assert list(tmp_path.iterdir()) == []


def test_text_and_json_are_written_and_replaced(tmp_path):
    path = tmp_path / "new" / "value.json"
    for value in ({"b": 1, "a": [1.5, None]}, {"ü": "ß"}):
        write_json_atomically(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
    write_text_atomically(path, "plain")
    assert path.read_text() == "plain"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text_atomically(path, "\ud800"),
        lambda path: write_json_atomically(path, {1, 2}),
        lambda path: write_bytes_atomically(path, "not bytes"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, write):
    path = tmp_path / "value"
    write_text_atomically(path, "old")
    with pytest.raises((ValueError, TypeError)):
        write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_can_be_read_by_whom_the_umask_lets(tmp_path):
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_text("")
    write_text_atomically(atomic, "")
    assert atomic.stat().st_mode == plain.stat().st_mode


def test_a_folder_appears_when_its_block_ends(tmp_path):
    target = tmp_path / "stages" / "key"
    with new_folder(target) as folder:
        (folder / "result.json").write_text("{}")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["result.json"]
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_whose_block_fails_never_appears(tmp_path):
    def fail():
        with new_folder(tmp_path / "key") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_of_two_processes_the_first_folder_stays(tmp_path):
    target = tmp_path / "key"
    with new_folder(target) as late:
        (late / "mine").write_text("")
        with new_folder(target) as early:
            (early / "theirs").write_text("")
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "key").write_text("a file")
    with pytest.raises(OSError, match="key"), new_folder(tmp_path / "key"):
        pass
    assert (tmp_path / "key").read_text() == "a file"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_token_is_the_same_wherever_the_workspace_is_moved(tmp_path):
    place = Workspace(tmp_path / "runs")
    assert place.token is None
    token = place.make_token()
    assert place.make_token() == place.token == token
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert Workspace(tmp_path / "moved").make_token() == token
    assert Workspace(tmp_path / "other").make_token() != token


def test_those_who_make_the_token_at_the_same_time_get_the_same_one(tmp_path):
    for race in range(20):
        place, barrier = Workspace(tmp_path / str(race)), threading.Barrier(4)

        def make(place=place, barrier=barrier):
            barrier.wait()
            return place.make_token()

        with ThreadPoolExecutor(4) as pool:
            tokens = {made.result() for made in [pool.submit(make) for _ in range(4)]}
        assert tokens == {place.token}
        assert [path.name for path in place.root.iterdir()] == [".workspace"]
