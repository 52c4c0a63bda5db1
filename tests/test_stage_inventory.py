"""What lies in a workspace is listed, checked, and removed only where nobody can need it."""

from __future__ import annotations

import errno
import io
import os
import time

import pytest
from rich.console import Console

from compress_search.exceptions import UnreadableStageError, WorkspaceError
from compress_search.leases import Lease, Leases
from compress_search.plan import CompressionPlan
from compress_search.progress import Progress
from compress_search.results import StageResult
from compress_search.stage_inventory import (
    StageUses,
    Use,
    live_keys,
    prune,
    take_inventory,
    verify,
    what_to_prune,
)
from compress_search.stage_store import StageStore
from compress_search.worker_process import Worker
from compress_search.workspace import Workspace

HOUR, DAY = 3600.0, 86_400.0
NOW = time.time()
HERE = Worker.this_process()
DEAD = Worker(HERE.host, HERE.pid, 1.0)


def use(trial=0, *, needed=True, study="study"):
    return Use(study=study, trial=trial, state="complete", needed=needed)


def uses(by_key=None, **others):
    return StageUses(by_key={key: (use(),) for key in by_key or ()}, **others)


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "runs").prepare()


@pytest.fixture
def age():
    """Make a file or a folder so many seconds old."""

    def make(path, seconds):
        for part in (*(path.iterdir() if path.is_dir() else ()), path):
            os.utime(part, (NOW - seconds, NOW - seconds))
        return path

    return make


@pytest.fixture
def store(workspace, tiny_net, age):
    """Store a stage of this key, and return its folder."""

    def make(key, seconds=30 * DAY):
        result = StageResult(key, "fine_tune", 0.9, 100, 10, 0.5, 2.0)
        StageStore(workspace).save(result, CompressionPlan(), tiny_net(), say=pytest.fail)
        return age(workspace.stages / key, seconds)

    return make


@pytest.fixture
def write(workspace, age):
    """Write a file, or a folder with one file, somewhere in the workspace."""

    def make(name, seconds=30 * DAY, *, folder=False):
        path = workspace.root / name
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        (path / "file" if folder else path).write_text("0123456789")
        return age(path, seconds)

    return make


def pruned(workspace, uses, **options):
    """Names of what is to go, with the reasons."""
    removals = what_to_prune(take_inventory(workspace, uses), now=NOW, **options)
    return {removal.item.path.name: removal.why for removal in removals}


def quiet():
    return Progress(Console(file=io.StringIO()))


def test_everything_is_listed_once_and_adds_up(workspace, store, write):
    folder = store("aaa")
    others = [
        write("stages/bbb.damaged-1", folder=True),
        write("tables/ccc.jsonl"),
        write("teacher/ggg.outputs"),
        write("teacher/.hhh.outputs.0123456789abcdef"),
        write("checkpoints/ddd", folder=True),
        write("stages/.eee.0123456789abcdef", folder=True),
        write("tables/.fff.jsonl.0123456789abcdef"),
    ]
    write("tables/ccc.lock")
    write("study/report.html")
    found = take_inventory(workspace, uses(["aaa"]))
    (stage,) = found.stages
    assert (stage.key, stage.path, stage.result.accuracy, stage.fault) == ("aaa", folder, 0.9, None)
    assert stage.uses == (use(),)
    assert stage.made == stage.used == pytest.approx(NOW - 30 * DAY)
    assert stage.size == sum(file.stat().st_size for file in folder.iterdir())
    listed = [*found.damaged, *found.tables, *found.teacher, *found.unfinished, *found.temporary]
    assert sorted(item.path for item in listed) == sorted(others)
    assert found.size == stage.size + 10 * len(others)


def test_what_is_no_workspace_is_refused(tmp_path):
    with pytest.raises(WorkspaceError, match=r"no folder 'stages'.* --workspace DIR"):
        take_inventory(Workspace(tmp_path), StageUses())


@pytest.mark.parametrize("damage", ["result.json", "plan.json", "weights.safetensors"])
def test_a_list_shows_the_damage_that_can_be_seen_without_reading_the_weights(workspace, store, damage):
    file = store("aaa") / damage
    file.unlink()
    (stage,) = take_inventory(workspace, uses(["aaa"])).stages
    assert damage in stage.fault


def test_verifying_sets_aside_what_is_damaged_and_says_whom_it_concerns(workspace, store):
    whole, flipped, empty = store("aaa"), store("bbb"), store("ccc")
    weights = flipped / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    for file in empty.iterdir():
        file.unlink()
    found = {damage.key: damage for damage in verify(workspace, uses(["aaa", "bbb"]), quiet())}
    assert set(found) == {"bbb", "ccc"}
    assert "weights.safetensors does not have the checksum" in found["bbb"].fault
    assert (found["bbb"].uses, found["ccc"].uses) == ((use(),), ())
    assert whole.is_dir() and not flipped.exists() and not empty.exists()
    assert all(damage.aside.name.startswith(f"{key}.damaged-") for key, damage in found.items())
    assert verify(workspace, StageUses(), quiet()) == ()


def test_what_was_set_aside_and_is_whole_stays_and_is_put_back_by_verifying(workspace, store, age):
    for key in ("sound", "again", "damaged"):
        aside = store(key).rename(workspace.stages / f"{key}.damaged-1")
    (aside / "plan.json").unlink()
    age(aside, DAY)
    store("again")
    known = uses(["sound", "again", "damaged"])
    # The one that was computed again is not the only copy.
    assert set(pruned(workspace, known)) == {"again.damaged-1", "damaged.damaged-1"}
    assert verify(workspace, known, quiet()) == ()
    left = {path.name for path in workspace.stages.iterdir()}
    assert left == {"sound", "again", "again.damaged-1", "damaged.damaged-1"}
    assert StageStore(workspace).find("sound") is not None


def test_what_was_set_aside_and_cannot_be_read_now_stays(workspace, store, monkeypatch):
    store("unknown").rename(workspace.stages / "unknown.damaged-1")

    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr("compress_search.stage_files.file_checksum", refused)
        assert pruned(workspace, uses()) == {}
        with pytest.raises(UnreadableStageError):
            verify(workspace, uses(), quiet())


def test_a_stage_that_cannot_be_read_now_is_listed_and_not_set_aside(workspace, store, monkeypatch):
    folder = store("aaa")

    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr("compress_search.stage_files.file_checksum", refused)
        (stage,) = take_inventory(workspace, uses(["aaa"])).stages
        assert "does not mean that it is damaged" in stage.fault
        with pytest.raises(UnreadableStageError, match="Permission denied"):
            verify(workspace, uses(["aaa"]), quiet())
    assert folder.is_dir()


def test_what_nobody_needs_goes(workspace, store, write):
    store("used")
    store("unused")
    write("stages/bbb.damaged-1", folder=True)
    write("stages/.eee.0123456789abcdef", folder=True)
    write("tables/.fff.jsonl.0123456789abcdef")
    write("checkpoints/used", folder=True)
    write("checkpoints/unused", folder=True)
    write("checkpoints/nobodys", folder=True)
    write("tables/ccc.jsonl")
    removals = what_to_prune(take_inventory(workspace, uses(["used"])), now=NOW)
    assert {(r.item.path.parent.name, r.item.path.name): r.why for r in removals} == {
        ("stages", "unused"): "no trial uses it",
        ("stages", "bbb.damaged-1"): "damaged, set aside",
        ("stages", ".eee.0123456789abcdef"): "left over from writing",
        ("tables", ".fff.jsonl.0123456789abcdef"): "left over from writing",
        ("checkpoints", "used"): "its stage is finished",
        ("checkpoints", "unused"): "its stage is finished",
        ("checkpoints", "nobodys"): "no unfinished trial can need it",
    }
    assert prune(workspace, removals) == removals
    left = {path.relative_to(workspace.root).as_posix() for path in workspace.root.rglob("*")}
    stage = {f"stages/used/{name}" for name in ("result.json", "plan.json", "weights.safetensors")}
    assert left == {"stages", "stages/used", *stage, "tables", "tables/ccc.jsonl", "checkpoints"}


def test_what_the_original_says_goes_when_no_trial_is_unfinished(workspace, write):
    write("teacher/old.outputs")
    write("teacher/new.outputs", 0.9 * HOUR)
    assert pruned(workspace, uses(unfinished_since=NOW - DAY)) == {}
    assert pruned(workspace, uses(gaps=("The database cannot be read.",))) == {}
    assert set(pruned(workspace, uses())) == {"old.outputs"}


def test_the_folder_of_a_study_that_is_called_as_the_outputs_folder_stays(workspace, write):
    for name in ("report.html", "config.yaml", "study.log", "export"):
        write(f"teacher/{name}", folder=name == "export")
    write("teacher/old.outputs")
    assert set(pruned(workspace, uses())) == {"old.outputs"}


def test_what_is_young_stays(workspace, store, write):
    store("unused", 0.9 * HOUR)
    write("stages/.eee.0123456789abcdef", 0.9 * HOUR, folder=True)
    write("checkpoints/nobodys", 0.9 * HOUR, folder=True)
    assert pruned(workspace, uses()) == {}


def test_a_stage_that_was_found_lately_stays(workspace, store):
    store("unused")
    assert set(pruned(workspace, uses())) == {"unused"}
    assert StageStore(workspace).find("unused") is not None
    assert pruned(workspace, uses()) == {}


def test_what_was_stored_since_an_unfinished_trial_began_stays(workspace, store, write):
    store("before", 3 * DAY)
    store("since", 2 * DAY)
    write("checkpoints/since-too", 2 * DAY, folder=True)
    assert set(pruned(workspace, uses(unfinished_since=NOW - 2.5 * DAY))) == {"before"}


def test_while_it_is_not_known_who_uses_what_all_stages_stay(workspace, store, write):
    store("unused")
    write("checkpoints/nobodys", folder=True)
    write("stages/bbb.damaged-1", folder=True)
    unknown = uses(gaps=("The database cannot be read.",))
    assert set(pruned(workspace, unknown, keep_front=True)) == {"bbb.damaged-1"}


def test_only_what_the_front_needs_is_kept_when_that_is_asked(workspace, store):
    for key in ("front", "beside", "shared"):
        store(key)
    by_key = {
        "front": (use(0),),
        "beside": (use(1, needed=False),),
        "shared": (use(1, needed=False), use(0, study="other")),
    }
    assert pruned(workspace, StageUses(by_key=by_key)) == {}
    assert set(pruned(workspace, StageUses(by_key=by_key), keep_front=True)) == {"beside"}


def test_only_what_is_old_enough_goes_when_that_is_asked(workspace, store, write):
    store("old", 8 * DAY)
    store("new", 6 * DAY)
    write("stages/bbb.damaged-1", 6 * DAY, folder=True)
    assert set(pruned(workspace, uses(), older_than=7 * DAY)) == {"old"}


def test_a_live_lease_keeps_its_stage_and_all_that_may_be_part_of_it(workspace, store, write):
    store("held")
    store("layer")
    write("checkpoints/held", folder=True)
    write("checkpoints/layer-too", folder=True)
    by_key = {"held": (use(needed=False),)}
    with Leases(workspace.stages, print).computing("held", "spatial_svd", lambda: None):
        assert live_keys(take_inventory(workspace, StageUses())) == {"held"}
        assert pruned(workspace, StageUses(by_key=by_key), keep_front=True) == {}
    assert set(pruned(workspace, StageUses(by_key=by_key), keep_front=True)) == {"held", "layer", "layer-too"}


def test_dead_leases_go_and_live_ones_stay(workspace, write):
    for name, holder in (("live", HERE), ("dead", DEAD), ("live.lease.waiting-1", DEAD)):
        file = write(f"stages/{name}.lease" if "." not in name else f"stages/{name}")
        file.write_text(Lease("fine_tune", holder, "token", 0.0).to_json())
    inventory = take_inventory(workspace, StageUses())
    removals = what_to_prune(inventory, now=NOW + HOUR)
    assert {r.item.path.name for r in removals} == {"dead.lease", "live.lease.waiting-1"}
    assert prune(workspace, removals) == removals
    assert [path.name for path in workspace.stages.iterdir()] == ["live.lease"]


def test_what_somebody_took_up_meanwhile_stays(workspace, store, write):
    for key in ("found", "leased", "needless"):
        store(key)
    dead = write("stages/taken.lease")
    dead.write_text(Lease("fine_tune", DEAD, "old", 0.0).to_json())
    removals = what_to_prune(take_inventory(workspace, uses()), now=NOW + 2 * HOUR)
    assert len(removals) == 4
    assert StageStore(workspace).find("found") is not None
    dead.write_text(Lease("fine_tune", HERE, "new", 0.0).to_json())
    with Leases(workspace.stages, print).computing("leased", "fine_tune", lambda: None):
        done = prune(workspace, removals)
    assert [removal.item.path.name for removal in done] == ["needless"]
    assert {path.name for path in workspace.stages.iterdir()} == {"found", "leased", "taken.lease"}
