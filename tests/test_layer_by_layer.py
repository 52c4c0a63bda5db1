"""Fine-tuning after each layer: exact MACs, replay, and going on with the layer that was interrupted."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from compress_search import compress, stages
from compress_search.checkpoint import load_weights
from compress_search.exceptions import ConfigError
from compress_search.plan import CompressionPlan, apply_plan
from compress_search.profile import profile_model
from compress_search.progress import Progress
from compress_search.recipe import Compress, FineTune, Recipe
from compress_search.stages import StageRunner
from compress_search.training import trainer
from compress_search.training.fine_tuning import fine_tune
from compress_search.training.trained import Trained
from compress_search.workspace import Workspace

TUNING = FineTune(epochs=1, lr=0.01)
LAYERS = {"spatial_svd": ["stem", "one", "two", "three", "four"], "channel_pruning": ["stem", "one", "three"]}
"""What each method compresses at the ratio of the tests, in forward order; two and four end in a sum."""

both_methods = pytest.mark.parametrize("method", LAYERS)


class Residual(nn.Module):
    """``(batch, 1, 6, 6) -> (batch, 3)`` with two sums, the second over a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(10, 8, 3, padding=1)
        self.three, self.four = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(x + self.two(functional.relu(self.one(x))))
        x = functional.relu(self.shortcut(x) + self.four(functional.relu(self.three(x))))
        return self.head(x.mean(dim=(2, 3)))


def stage_of(method, **changes):
    settings = {
        "mac_ratio": 0.6,
        "selection": "uniform",
        "samples": 48,
        "ignore": ("head", "shortcut"),
        "per_layer_fine_tune": TUNING,
    }
    return Compress(method=method, **settings | changes)


@pytest.fixture
def task(tiny_task):
    torch.manual_seed(0)
    return tiny_task(model=Residual())


@pytest.fixture
def runner(task, tmp_path):
    def make(folder="work", task=task):
        workspace = Workspace(tmp_path / folder).prepare()
        return StageRunner(task, workspace, seed=0, device=torch.device("cpu"), progress=Progress())

    return make


@pytest.fixture
def weights(tmp_path):
    """Read the stored weights of a stage as bytes."""
    return lambda folder, key: (tmp_path / folder / "stages" / key / "weights.safetensors").read_bytes()


class Interrupted(Exception):
    """Stands for whatever ends a run."""


class Tunings(list):
    """The MACs at each fine-tuning; when so many as ``stop_after`` are done, the next one is interrupted."""

    stop_after = None

    def forget(self):
        self.clear()
        self.stop_after = None


@pytest.fixture
def tunings(monkeypatch):
    """Watch the fine-tunings after single layers."""
    seen = Tunings()

    def watched(model, *args, **kwargs):
        if len(seen) == seen.stop_after:
            raise Interrupted
        seen.append(profile_model(model, torch.zeros(1, 1, 6, 6)).macs)
        return fine_tune(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "fine_tune", watched)
    return seen


@both_methods
def test_the_macs_are_those_of_the_chosen_sizes_and_the_plan_rebuilds_the_model(
    runner, task, tmp_path, method
):
    one = runner()
    predicted = one.achieved_ratio([stage_of(method)])
    at_once = stage_of(method, per_layer_fine_tune=None)
    (result,), (other,) = (one.run(Recipe((stage,))) for stage in (stage_of(method), at_once))
    assert result.mac_ratio == predicted == other.mac_ratio <= 0.6
    assert result.params == other.params
    assert result.key != other.key
    folder = tmp_path / "work" / "stages" / result.key
    plan = CompressionPlan.from_dict(json.loads((folder / "plan.json").read_text()))
    model = apply_plan(task.build_model(), plan)
    load_weights(model, folder / "weights.safetensors")
    assert profile_model(model, task.example_input).macs == result.macs
    assert task.score(model) == result.accuracy
    (step,) = plan.steps
    assert step.mac_ratio == result.mac_ratio
    assert step.left_alone["head"].startswith("you asked")


@both_methods
def test_each_layer_is_trained_upon_in_forward_order(runner, tunings, caplog, method):
    with caplog.at_level(logging.INFO, logger="compress_search"):
        runner().run(Recipe((stage_of(method),)))
    number = len(LAYERS[method])
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("layers ")]
    assert [line.split(" at size ")[0] for line in told] == [
        f"layers {place}/{number}: {layer}" for place, layer in enumerate(LAYERS[method], start=1)
    ]
    assert tunings == sorted(set(tunings), reverse=True)


@both_methods
def test_each_layer_is_compressed_in_the_model_that_was_trained_before(
    runner, task, tmp_path, monkeypatch, method
):
    def add_one(model, *args, **kwargs):
        # Nothing refits the bias of a layer that is to be left alone.
        with torch.no_grad():
            model.head.bias += 1.0
        return Trained(0.5)

    monkeypatch.setattr(trainer, "fine_tune", add_one)
    (result,) = runner().run(Recipe((stage_of(method),)))
    stored = load_file(tmp_path / "work" / "stages" / result.key / "weights.safetensors")
    torch.testing.assert_close(stored["head.bias"], task.model.head.bias + len(LAYERS[method]))


@both_methods
def test_one_layer_without_training_becomes_what_it_becomes_at_once(runner, weights, monkeypatch, method):
    monkeypatch.setattr(trainer, "fine_tune", lambda *args, **kwargs: Trained(0.5))
    ignore = tuple({"stem", "two", "three", "four", "shortcut", "head"})
    one_layer = stage_of(method, mac_ratio=0.85, ignore=ignore)
    one = runner()
    keys = [
        one.run(Recipe((stage,)))[0].key
        for stage in (one_layer, dataclasses.replace(one_layer, per_layer_fine_tune=None))
    ]
    assert keys[0] != keys[1]
    assert weights("work", keys[0]) == weights("work", keys[1])


@both_methods
def test_one_result_a_stage_is_all_that_stays(runner, tmp_path, method):
    one = runner()
    results = one.run(Recipe((stage_of(method), TUNING)))
    assert [result.name for result in results] == [method, "fine_tune"]
    stored = {path.name for path in (tmp_path / "work" / "stages").iterdir()}
    assert stored == {one.original.key, *(result.key for result in results)}
    assert [result.reused for result in runner().run(Recipe((stage_of(method), TUNING)))] == [True, True]


@both_methods
@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_run_goes_on_with_the_layer_that_it_was_at(
    runner, weights, tunings, tmp_path, method, done
):
    recipe = Recipe((stage_of(method),))
    (whole,) = runner("whole").run(recipe)
    in_order = tunings.copy()
    tunings.forget()
    tunings.stop_after = done
    with pytest.raises(Interrupted):
        runner().run(recipe)
    assert len(list((tmp_path / "work" / "stages").iterdir())) == 1 + min(done, 2)
    tunings.forget()
    (resumed,) = runner().run(recipe)
    assert tunings == in_order[done:]
    assert not resumed.reused
    assert resumed.accuracy == whole.accuracy
    assert weights("work", resumed.key) == weights("whole", whole.key)
    assert {path.name for path in (tmp_path / "work" / "stages").iterdir()} == {
        resumed.key,
        runner().original.key,
    }


def test_no_more_than_two_layers_are_stored_at_a_time(runner, tunings, tmp_path):
    tunings.stop_after = 4
    with pytest.raises(Interrupted):
        runner().run(Recipe((stage_of("spatial_svd"),)))
    assert len(list((tmp_path / "work" / "stages").iterdir())) == 1 + 2


def test_of_a_damaged_layer_the_one_before_is_taken(runner, weights, tunings, tmp_path, caplog):
    recipe = Recipe((stage_of("spatial_svd"),))
    (whole,) = runner("whole").run(recipe)
    tunings.forget()
    tunings.stop_after = 3
    one = runner()
    with pytest.raises(Interrupted):
        one.run(recipe)
    last = max(
        (path for path in (tmp_path / "work" / "stages").iterdir() if path.name != one.original.key),
        key=lambda path: (path / "result.json").stat().st_mtime_ns,
    )
    (last / "weights.safetensors").write_bytes(b"nothing")
    tunings.forget()
    (resumed,) = runner().run(recipe)
    assert f"{last.name} is damaged" in caplog.text
    assert len(tunings) == len(LAYERS["spatial_svd"]) - 2
    assert weights("work", resumed.key) == weights("whole", whole.key)


def test_a_run_that_died_in_a_training_loader_goes_on(runner, task, weights, tmp_path):
    class Mortal:
        """The task's loader; dies when it is asked for batches once too often."""

        def __init__(self, lives):
            self.lives = lives

        def __iter__(self):
            if self.lives == 0:
                raise KeyboardInterrupt
            self.lives -= 1
            return iter(batches)

        def __len__(self):
            return len(batches)

    batches = list(task.train)
    recipe = Recipe((stage_of("channel_pruning"),))
    mortal = dataclasses.replace(task, train=Mortal(lives=10**9), calibration=task.train)
    (whole,) = runner("whole", mortal).run(recipe)
    one = runner("work", mortal)
    assert one.original.key  # What a run asks of the loader before any training.
    mortal.train.lives = 1
    with pytest.raises(KeyboardInterrupt):
        one.run(recipe)
    mortal.train.lives = len(LAYERS["channel_pruning"]) - 1
    (resumed,) = one.run(recipe)
    assert weights("work", resumed.key) == weights("whole", whole.key)


def test_the_model_is_evaluated_for_the_training_alone(runner, task):
    calls = []

    def evaluate(model, loader):
        calls.append(model)
        return 0.5

    one = runner(task=dataclasses.replace(task, evaluate=evaluate))
    assert one.original.accuracy == 0.5
    calls.clear()
    one.run(Recipe((stage_of("channel_pruning", per_layer_fine_tune=FineTune(epochs=2)),)))
    # Before the training and after each of two epochs; not again for the stage.
    assert len(calls) == 3 * len(LAYERS["channel_pruning"])


def test_where_nothing_is_to_compress_nothing_is_trained(runner, tunings):
    one = runner()
    (result,) = one.run(Recipe((stage_of("channel_pruning", mac_ratio=1.0),)))
    assert tunings == []
    assert (result.accuracy, result.mac_ratio) == (one.original.accuracy, 1.0)


def test_a_group_that_keeps_its_size_is_no_layer_to_train_upon(runner, tunings, monkeypatch):
    sizes = {"stem": 8, "one": 5, "three": 12}
    monkeypatch.setattr(stages, "choose_sizes", lambda *args: sizes)
    one = runner()
    (result,) = one.run(Recipe((stage_of("channel_pruning"),)))
    assert tunings == [result.macs]
    assert result.macs < one.original.macs


def test_both_methods_follow_each_other_and_what_must_stay_stays(runner, task, tmp_path):
    kept = {"one": (3, 9), "three": (0, 11), "stem": (7,)}
    first, second = [
        stage_of(method, mac_ratio=ratio, keep_channels=kept, ignore=("head", "short*"), samples=samples)
        for method, ratio, samples in (("spatial_svd", 0.8, 48), ("channel_pruning", 0.5, 0))
    ]
    one = runner()
    predicted = one.achieved_ratio([first, second])
    results = one.run(Recipe((first, second, TUNING)))
    assert results[-1].mac_ratio == predicted
    folder = tmp_path / "work" / "stages" / results[-1].key
    plan = CompressionPlan.load(folder / "plan.json")
    model = apply_plan(task.build_model(), plan)
    load_weights(model, folder / "weights.safetensors")
    assert profile_model(model, task.example_input).macs == results[-1].macs
    for layer, channels in kept.items():
        name, places = plan.outputs_after(layer, channels)
        assert len(places) == len(channels)
        left = model.get_submodule(name).out_channels
        assert max(places) < left < task.model.get_submodule(layer).out_channels
    assert model.shortcut.in_channels < 8 and isinstance(model.shortcut, nn.Conv2d)


@both_methods
def test_any_of_its_settings_makes_another_stage(runner, method):
    one = runner()
    tunings = (None, TUNING, dataclasses.replace(TUNING, lr=0.02))
    recipes = [Recipe((stage_of(method, per_layer_fine_tune=tuning),)) for tuning in tunings]
    assert len({one.run(recipe)[0].key for recipe in recipes}) == 3


def test_without_a_task_there_is_nothing_to_train_on(task):
    class Untouched(nn.Module):
        def forward(self, x):
            raise AssertionError("work has started")

    with pytest.raises(ConfigError, match=r"per_layer_fine_tune is FineTune\(.*no data .*Leave it out here"):
        compress(Untouched(), task.example_input, [], stage_of("spatial_svd"))
