"""The stage loop: reuse, resume, and what is done with damaged files."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import logging
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress_search import disk_space
from compress_search.checkpoint import load_weights
from compress_search.exceptions import LostStageError, PlanError, UnreadableStageError
from compress_search.fingerprint import model_fingerprint
from compress_search.plan import CompressionPlan, apply_plan
from compress_search.profile import profile_model
from compress_search.progress import Progress
from compress_search.recipe import Compress, FineTune, Recipe
from compress_search.stage_store import StageStore
from compress_search.stages import StageRunner
from compress_search.task import Task, accuracy
from compress_search.training import training_run
from compress_search.workspace import Workspace

RECIPE = Recipe(
    (
        Compress(method="spatial_svd", mac_ratio=0.8, samples=32),
        FineTune(epochs=1, lr=0.01),
        Compress(method="channel_pruning", mac_ratio=0.7, samples=32),
        FineTune(epochs=1, lr=0.02),
    )
)


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    inputs, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 4
    batches = list(zip(inputs.split(16), labels.split(16), strict=True))
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 4),
    )
    return Task(model=net, example_input=inputs[:1], train=batches, validation=batches)


@pytest.fixture
def runner(task, tmp_path):
    def make(folder="work", task=task, seed=0):
        workspace = Workspace(tmp_path / folder).prepare()
        return StageRunner(task, workspace, seed=seed, device=torch.device("cpu"), progress=Progress())

    return make


def test_nothing_is_reused_that_another_loss_evaluation_or_data_made(runner, task):
    *most, (inputs, labels) = task.validation
    tasks = [
        task,
        dataclasses.replace(task, loss=nn.CrossEntropyLoss(label_smoothing=0.3)),
        dataclasses.replace(task, loss=nn.CrossEntropyLoss(weight=torch.arange(4.0))),
        *(dataclasses.replace(task, evaluate=partial(share_of, k=k)) for k in (1, 2)),
        dataclasses.replace(task, validation=[*most, (inputs, labels.roll(1))]),
        dataclasses.replace(task, train=[*most, (inputs, labels.roll(1))]),
    ]
    keys = set()
    for number, one in enumerate(tasks):
        result = runner(task=one).run(RECIPE)[-1]
        assert not result.reused, number
        keys.add(result.key)
    assert len(keys) == len(tasks)
    assert runner(task=dataclasses.replace(task, evaluate=partial(share_of, k=2))).run(RECIPE)[-1].reused


def share_of(model, loader, k):
    return k * accuracy(model, loader)


def test_where_the_validation_shuffles_and_drops_the_rest_all_are_judged_by_the_same(runner, task):
    data = TensorDataset(*map(torch.cat, zip(*task.validation, strict=True)))
    shuffled = dataclasses.replace(
        task, validation=DataLoader(data, batch_size=5, shuffle=True, drop_last=True)
    )
    found = {runner(folder=f"run{number}", task=shuffled).reference.accuracy for number in range(6)}
    assert len(found) == 1


def test_a_recipe_leaves_one_stored_stage_each(runner, task, tmp_path):
    before = model_fingerprint(task.model)
    results = runner().run(RECIPE)
    assert [result.name for result in results] == ["spatial_svd", "fine_tune", "channel_pruning", "fine_tune"]
    assert not any(result.reused for result in results)
    original = profile_model(task.model, task.example_input)
    for result in results:
        folder = tmp_path / "work" / "stages" / result.key
        model = apply_plan(task.build_model(), CompressionPlan.load(folder / "plan.json"))
        load_weights(model, folder / "weights.safetensors")
        profile = profile_model(model, task.example_input)
        assert (profile.macs, profile.params) == (result.macs, result.params)
        assert result.mac_ratio == profile.macs / original.macs
        assert task.score(model) == result.accuracy
    assert results[0].mac_ratio == results[1].mac_ratio <= 0.8
    assert results[3].mac_ratio <= 0.7 * results[1].mac_ratio
    assert model_fingerprint(task.model) == before


def test_finished_stages_are_reused_by_any_later_run(runner):
    first = runner().run(RECIPE)
    again = runner().run(RECIPE)
    assert all(result.reused for result in again)
    assert [dataclasses.replace(result, reused=False) for result in again] == list(first)
    other_end = Recipe((*RECIPE.stages[:3], FineTune(epochs=1, lr=0.05)))
    assert [result.reused for result in runner().run(other_end)] == [True, True, True, False]


def changed(recipe, position, **changes):
    stages = list(recipe.stages)
    stages[position] = dataclasses.replace(stages[position], **changes)
    return Recipe(tuple(stages))


@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("tuning", [None, FineTune(epochs=1)])
def test_other_ratios_that_lead_to_the_same_sizes_are_not_computed_again(runner, position, tuning):
    first = changed(RECIPE, position, per_layer_fine_tune=tuning)
    ratio = first.stages[position].mac_ratio
    nearly = changed(first, position, mac_ratio=ratio + 1e-4)
    smaller = changed(first, position, mac_ratio=ratio / 2)
    found, again, other = (runner().run(recipe) for recipe in (first, nearly, smaller))
    assert [dataclasses.replace(result, reused=False) for result in again] == list(found)
    assert all(result.reused for result in again)
    assert [result.reused for result in other] == [index < position for index in range(4)]
    assert other[position].macs < found[position].macs
    # What the sizes follow from decides alone: the settings beside the ratio are compared as they are.
    samples = runner().run(changed(nearly, position, samples=16))
    assert not samples[position].reused


def test_a_note_of_the_same_sizes_that_is_damaged_or_without_its_stage_is_of_no_harm(runner, tmp_path):
    first = runner().run(RECIPE)
    nearly = changed(RECIPE, 2, mac_ratio=0.7001)
    notes = sorted((tmp_path / "work" / "plans").iterdir())
    assert len(notes) == 2
    for text in ("../study.db", "0123456789abcdef0123"):
        for note in notes:
            note.write_text(text)
        shutil.rmtree(tmp_path / "work" / "stages" / first[2].key, ignore_errors=True)
        again = runner().run(nearly)
        assert [result.accuracy for result in again] == [result.accuracy for result in first]
        assert not again[2].reused
        shutil.rmtree(tmp_path / "work" / "stages" / again[2].key)


def test_a_full_disk_is_waited_out(runner, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="compress_search")
    recipe = Recipe((*RECIPE.stages[:2], dataclasses.replace(RECIPE.stages[2], selection="optimal")))
    undisturbed = runner("undisturbed").run(recipe)
    fsync, calls = os.fsync, itertools.count()

    def full_at_times(descriptor):
        if next(calls) in (1, 9, 25, 50, 80, 120):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_times)
    monkeypatch.setattr(disk_space, "_SECONDS", 0.0)
    found = runner("full").run(recipe)
    assert next(calls) > 25
    assert caplog.text.count("No space left on device") == caplog.text.count("There is room") > 1
    for one, other in zip(undisturbed, found, strict=True):
        assert (one.key, one.accuracy) == (other.key, other.accuracy)
        weights = [
            (tmp_path / folder / "stages" / one.key / "weights.safetensors").read_bytes()
            for folder in ("undisturbed", "full")
        ]
        assert weights[0] == weights[1]


def test_a_rerun_elsewhere_gives_the_same_bits(runner, tmp_path):
    keys = [runner(folder).run(RECIPE)[-1].key for folder in ("one", "two")]
    assert keys[0] == keys[1]
    weights = [
        (tmp_path / folder / "stages" / keys[0] / "weights.safetensors").read_bytes()
        for folder in ("one", "two")
    ]
    assert weights[0] == weights[1]


class Looking:
    """A loader that notes what it is asked for, in the order in which it yields it."""

    def __init__(self, batches):
        self.batches, self.epochs = batches, []

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        order = torch.randperm(len(self.batches)).tolist()
        self.epochs.append(order)
        return (self.batches[number] for number in order)


def test_all_recipes_see_the_same_data_and_ask_the_original_once(runner, task, monkeypatch):
    task = dataclasses.replace(task, train=Looking([*task.train] * 4))
    first, second = runner("one", task), runner("two", task)
    other = Recipe((dataclasses.replace(RECIPE.stages[0], mac_ratio=0.6), *RECIPE.stages[1:]))
    asked = []
    ask = training_run._outputs_of
    monkeypatch.setattr(training_run, "_outputs_of", lambda *args: asked.append(1) or ask(*args))

    def trained(runner, recipe):
        # To make a stage's key draws its data's first batch.
        del task.train.epochs[:], asked[:]
        results = runner.run(recipe)
        return results, task.train.epochs[-2:], len(asked)

    first.run(Recipe(()))
    _, epochs, questions = trained(first, RECIPE)
    assert questions == 2 * len(task.train)
    # The second fine-tuning of a recipe sees the data in another order than its first.
    assert epochs[0] != epochs[1]
    reusing, same_epochs, none = trained(first, other)
    assert (same_epochs, none) == (epochs, 0)
    second.run(Recipe(()))
    alone, _, questions = trained(second, other)
    assert questions == 2 * len(task.train)
    assert [result.accuracy for result in alone] == [result.accuracy for result in reusing]
    weights = [files.weights(alone[-1].key).read_bytes() for files in (first._store, second._store)]
    assert weights[0] == weights[1]


def test_an_interrupted_run_goes_on_where_it_stopped(runner):
    class Stop(Exception):
        pass

    def stop(stage, result):
        if result.name == "channel_pruning":
            raise Stop

    with pytest.raises(Stop):
        runner().run(RECIPE, after_stage=stop)
    resumed = runner().run(RECIPE)
    assert [result.reused for result in resumed] == [True, True, True, False]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"task": "evaluate"},
        {"task": "validation"},
        {"task": "model"},
    ],
    ids=str,
)
def test_whatever_changes_the_outcome_changes_the_key(runner, task, other):
    changed = {
        "evaluate": lambda: dataclasses.replace(task, evaluate=lambda model, loader: 0.5),
        "validation": lambda: dataclasses.replace(task, validation=task.validation[1:]),
        "model": lambda: dataclasses.replace(task, model=_nudged(task.model)),
    }
    settings = {"task": changed[other["task"]]()} if "task" in other else other
    assert runner(**settings).original.key != runner().original.key


def _nudged(model: nn.Module) -> nn.Module:
    import copy

    nudged = copy.deepcopy(model)
    with torch.no_grad():
        nudged[0].bias[0] += 1e-3
    return nudged


def flip(position):
    """Make a damage that flips the lowest bit at a share of the file's length."""

    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first bit": flip(0),
    "bit in the middle": flip(0.5),
    "bit in the last quarter": flip(0.75),
    "last bit": flip(1),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "all gone": lambda path: [other.unlink() for other in path.parent.iterdir()],
}


@pytest.fixture
def stored(runner, tmp_path):
    """Two stages, and the folder of the last."""
    results = runner().run(Recipe(RECIPE.stages[:2]))
    return results, tmp_path / "work" / "stages" / results[1].key


@pytest.mark.parametrize("file", ["weights.safetensors", "plan.json", "result.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stage_is_set_aside_and_computed_again(runner, stored, caplog, file, damage):
    first, folder = stored
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    DAMAGES[damage](folder / file)
    with caplog.at_level(logging.WARNING):
        again = runner().run(Recipe(RECIPE.stages[:2]))
    assert f"The stored stage {first[1].key} is damaged" in caplog.text
    assert [result.reused for result in again] == [True, False]
    # Seconds differ, and are in result.json; the rest is the same to the last bit.
    # It was told of what the original had said of the batches before.
    assert again[1].teacher_seconds_saved > first[1].teacher_seconds_saved == 0
    times = {"seconds": 0.0, "teacher_seconds_saved": 0.0}
    assert dataclasses.replace(again[1], **times) == dataclasses.replace(first[1], **times)
    for name in ("plan.json", "weights.safetensors"):
        assert (folder / name).read_bytes() == contents[name]
    (aside,) = folder.parent.glob(f"{folder.name}.damaged-*")
    assert str(aside) in caplog.text
    assert [result.reused for result in runner().run(Recipe(RECIPE.stages[:2]))] == [True, True]


def test_a_stage_that_is_damaged_while_its_runner_lives_is_not_used(runner, stored, caplog):
    _, folder = stored
    one = runner()
    assert one.run(Recipe(RECIPE.stages[:2]))[1].reused
    flip(0.5)(folder / "weights.safetensors")
    assert [result.reused for result in one.run(RECIPE)] == [True, False, False, False]
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("file", ["weights.safetensors", "plan.json"])
def test_a_stage_that_is_damaged_between_finding_and_reading_is_not_used(
    runner, stored, task, file, tmp_path
):
    first, folder = stored
    store = StageStore(Workspace(tmp_path / "work"))
    assert store.find(first[1].key) is not None
    flip(0.5)(folder / file)
    with pytest.raises(
        LostStageError, match=r"damaged while it was in use .* moved to .* Run the same again"
    ):
        store.model(first[1].key, task.build_model())
    assert not folder.exists()
    with pytest.raises(LostStageError, match=r"is gone \(FileNotFoundError.*\)\. Run the same again"):
        store.model(first[1].key, task.build_model())


def test_damage_to_what_is_stored_of_the_original_stands_in_nobodys_way(runner, tmp_path):
    undisturbed, disturbed = runner("undisturbed"), runner("disturbed")
    wanted = undisturbed.run(RECIPE)
    shutil.rmtree(tmp_path / "disturbed" / "stages" / disturbed.original.key)
    assert disturbed.achieved_ratio(RECIPE.stages[:1]) == wanted[0].mac_ratio
    assert [result.key for result in disturbed.run(RECIPE)] == [result.key for result in wanted]
    last = tmp_path.glob(f"*/stages/{wanted[-1].key}/weights.safetensors")
    one, other = (path.read_bytes() for path in last)
    assert one == other


def no_more_files(path):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_stage_that_cannot_be_read_now_stays_where_it_is(stored, tmp_path, monkeypatch):
    first, folder = stored
    store = StageStore(Workspace(tmp_path / "work"))
    with monkeypatch.context() as patch:
        patch.setattr("compress_search.stage_files.file_checksum", no_more_files)
        for look in (
            store.find,
            store.plan,
            store.weights,
            lambda key: store.set_aside(key, "it was damaged"),
        ):
            with pytest.raises(UnreadableStageError, match="it stays as it is"):
                look(first[1].key)
    assert store.find(first[1].key) == first[1]
    assert not list(folder.parent.glob("*.damaged-*"))


def test_a_note_that_cannot_be_read_now_does_not_have_its_stage_computed_again(
    stored, tmp_path, monkeypatch, runner
):
    read = Path.read_text

    def refused(path, *args, **options):
        if path.parent.name == "plans":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(UnreadableStageError, match="Make the workspace readable"):
        runner().run(Recipe(RECIPE.stages[:2]))


def test_two_processes_that_find_the_same_damage_report_it_once(stored, caplog, tmp_path):
    first, folder = stored
    store = StageStore(Workspace(tmp_path / "work"))
    good = tmp_path / "good"
    shutil.copytree(folder, good)
    flip(0.5)(folder / "plan.json")
    # Between the look and the move of the one, the other has moved it...
    shutil.move(folder, tmp_path / "moved")
    assert store.set_aside(first[1].key, "it is damaged") is None
    # ... and has computed it again.
    shutil.copytree(good, folder)
    assert store.set_aside(first[1].key, "it is damaged") is None
    assert store.find(first[1].key) == first[1]
    assert caplog.text == ""


def test_the_achieved_ratio_is_known_before_the_stage_runs(runner):
    one = runner()
    predicted = one.achieved_ratio(RECIPE.stages[:1])
    assert not (one.run(Recipe(RECIPE.stages[:1]))[0].reused)
    assert one.run(Recipe(RECIPE.stages[:1]))[0].mac_ratio == predicted
    assert one.achieved_ratio(RECIPE.stages[:1]) == predicted
    assert one.achieved_ratio(RECIPE.stages[:3]) == one.run(RECIPE)[2].mac_ratio


def test_the_reference_is_measured_once(runner, task):
    calls = []

    def evaluate(model, loader):
        calls.append(model)
        return 0.25

    counted = dataclasses.replace(task, evaluate=evaluate)
    assert runner(task=counted).reference.accuracy == 0.25
    assert runner(task=counted).reference.accuracy == 0.25
    assert len(calls) == 1


def test_channels_of_the_original_model_stay_through_both_methods(runner, tmp_path):
    wanted = {"0": (7,), "3": (0, 5, 11)}
    recipe = Recipe(
        tuple(
            Compress(method=method, mac_ratio=ratio, samples=32, selection="uniform", keep_channels=wanted)
            for method, ratio in (("spatial_svd", 0.8), ("channel_pruning", 0.5), ("channel_pruning", 0.4))
        )
    )
    results = runner().run(recipe)
    plan = CompressionPlan.load(tmp_path / "work" / "stages" / results[-1].key / "plan.json")
    assert results[-1].mac_ratio < 0.2
    for layer, channels in wanted.items():
        left = list(range({"0": 8, "3": 12}[layer]))
        cuts = [e for step in plan.steps for e in step.edits if e.layer == f"{layer}.horizontal"]
        for edit in cuts:
            left = [left[place] for place in edit.outputs or range(len(left))]
        assert set(channels) <= set(left)
        assert len(left) < {"0": 8, "3": 12}[layer]
    # In the first layer the wanted channel had moved before it was cut again.
    assert sum(edit.layer == "0.horizontal" for step in plan.steps for edit in step.edits) == 2


def test_channels_that_an_earlier_step_removed_cannot_be_kept(runner):
    stages = [Compress(method="channel_pruning", mac_ratio=0.5, samples=0, selection="uniform")]
    stages.append(dataclasses.replace(stages[0], keep_channels={"3": tuple(range(12))}))
    with pytest.raises(PlanError, match=r"of '3' is to be kept, but an earlier step of the plan has removed"):
        runner().run(Recipe(tuple(stages)))


def test_channels_to_keep_are_part_of_a_stages_key(runner):
    stage = Compress(method="channel_pruning", mac_ratio=0.8, samples=0, selection="uniform")
    runner().run(Recipe((stage,)))
    (other,) = runner().run(Recipe((dataclasses.replace(stage, keep_channels={"0": (1,)}),)))
    assert not other.reused


@pytest.mark.parametrize("tuning", [None, FineTune(epochs=1)])
def test_a_ratio_comes_to_the_same_whether_or_not_another_was_there_before(runner, tuning):
    first = changed(RECIPE, 0, per_layer_fine_tune=tuning)
    nearly = changed(first, 0, mac_ratio=first.stages[0].mac_ratio + 1e-4)
    runner("shared").run(first)
    after_another, alone = runner("shared").run(nearly), runner("alone").run(nearly)
    assert all(result.reused for result in after_another)
    assert [result.key for result in alone] == [result.key for result in after_another]
    assert [result.accuracy for result in alone] == [result.accuracy for result in after_another]
