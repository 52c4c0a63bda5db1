"""A training function of the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_search.exceptions import TrainingError
from compress_search.fingerprint import model_fingerprint
from compress_search.progress import Progress
from compress_search.recipe import Compress, FineTune, Recipe
from compress_search.stages import StageRunner
from compress_search.stopping import StopSwitch
from compress_search.task import Task
from compress_search.training.trainer import Trainer
from compress_search.workspace import Workspace


@pytest.fixture
def train(tiny_task, tiny_net, tmp_path):
    def run(training, settings=None, *, after_epoch=None, make_model=tiny_net, **changes):
        task = tiny_task(training=training, **changes)
        model = make_model()
        trainer = Trainer(task, Workspace(tmp_path), Progress(), 60.0, StopSwitch())
        done = trainer.train(
            model,
            tiny_net(seed=1),
            settings or FineTune(epochs=2),
            "0123456789abcdef",
            "fedcba",
            after_epoch=after_epoch,
        )
        run.curve = done.learning_curve
        return model, done.accuracy, trainer

    return run


def by_hand(model, job):
    """Plain gradient descent on the task's own loss."""
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=job.settings.lr)
    for _ in range(job.settings.epochs):
        for inputs, targets in job.task.train:
            optimiser.zero_grad()
            job.task.loss(model(inputs), targets).backward()
            optimiser.step()


def test_it_trains_in_place_of_the_packages_own(train, tiny_net):
    model, score, trainer = train(by_hand, FineTune(epochs=6, lr=0.1))
    assert score == trainer.task.score(model) > trainer.task.score(tiny_net())
    assert not model.training
    assert train.curve == ()


def test_it_is_seeded_and_told_everything(train, tmp_path, tiny_net):
    jobs, drawn = [], []

    def training(model, job):
        assert all(module.training for module in model.modules())
        jobs.append(job)
        drawn.append(torch.rand(()).item())
        (job.folder / "mine.txt").write_text("kept")

    settings = FineTune(epochs=2, options={"layers": [1, 2]})
    for _ in range(2):
        *_, trainer = train(training, settings)
    assert drawn[0] == drawn[1]
    (job, again) = jobs
    assert job.settings.options == {"layers": [1, 2]} and job.seed == again.seed
    assert job.device == torch.device("cpu") and not job.stop_requested()
    assert (job.folder / "mine.txt").read_text() == "kept"
    assert model_fingerprint(job.original) == model_fingerprint(tiny_net(seed=1))
    trainer.forget("0123456789abcdef")
    assert not job.folder.exists()


def test_what_is_worse_is_not_kept(train, tiny_net, caplog):
    caplog.set_level("INFO", logger="compress_search")

    def spoil(model, job):
        nn.init.zeros_(model[-1].weight)
        nn.init.zeros_(model[-1].bias)

    scores = iter([0.9, 0.3])
    model, score, _ = train(spoil, evaluate=lambda *_: next(scores))
    assert score == 0.9 and model_fingerprint(model) == model_fingerprint(tiny_net())
    assert "spoil made the model worse (0.9000 before, 0.3000 after): it is left as it was" in caplog.text


@pytest.mark.parametrize(("after", "kept"), [(0.85, 0.85), (0.84, 0.9)])
def test_a_little_worse_may_be_the_luck_of_the_images(train, monkeypatch, after, kept):
    scores = iter([0.9, after])
    monkeypatch.setattr(Task, "score", lambda *_: next(scores))
    _, score, _ = train(by_hand)
    assert score == kept


def raising(model, job):
    raise ValueError("no")


def growing(model, job):
    model.add_module("more", nn.Linear(1, 1))


def exploding(model, job):
    nn.init.constant_(model[0].weight, float("nan"))


def halving(model, job):
    model.bfloat16()


@pytest.mark.parametrize(
    ("training", "words"),
    [
        (raising, r"Task\.training \(raising\) raised ValueError: no"),
        (growing, r"other tensors than it was given \(more\.bias, for example\)"),
        (exploding, r"left values in 0\.weight that are not finite"),
        (halving, r"left 0\.weight as torch\.bfloat16, not as torch\.float32"),
    ],
)
def test_what_it_does_wrong_is_told(train, training, words):
    with pytest.raises(TrainingError, match=words):
        train(training)


def test_what_it_froze_is_free_again_for_the_next_stage(train, tiny_net):
    def freezing(model, job):
        model[0].requires_grad_(False)
        model[1].requires_grad_(True)

    def frozen():
        model = tiny_net()
        model[1].requires_grad_(False)
        return model

    model, _, _ = train(freezing, make_model=frozen)
    wanted = [parameter.requires_grad for parameter in frozen().parameters()]
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert not all(wanted)


def test_a_mask_of_infinite_values_is_no_fault(train, tiny_net):
    def masked():
        model = tiny_net()
        model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        return model

    model, _, _ = train(by_hand, make_model=masked)
    assert model.mask[1] == -torch.inf


def telling(*told):
    """Trains nothing, and tells these epochs."""

    def training(model, job):
        for epoch, accuracy in told:
            job.epoch_done(epoch, accuracy)

    return training


@pytest.fixture
def before(tiny_task):
    task = tiny_task()
    return task.score(task.build_model().eval())


def test_epochs_that_are_told_are_its_learning_curve(train, before):
    seen = []
    train(telling((1, 0.5), (2, 0.75)), after_epoch=lambda curve: seen.append(tuple(curve)))
    assert train.curve == (before, 0.5, 0.75)
    assert seen == [(before, 0.5), (before, 0.5, 0.75)]


def test_a_curve_goes_on_where_the_function_was_stopped(train, before):
    def stopped(model, job):
        job.epoch_done(1, 0.5)
        job.epoch_done(2, 0.6)
        raise KeyboardInterrupt

    settings = FineTune(epochs=4)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, settings)
    # It goes on from the checkpoint of the first epoch; the third is not told.
    train(telling((2, 0.7), (4, 0.9)), settings)
    assert train.curve == (before, 0.5, 0.7, 0.7, 0.9)


@pytest.mark.parametrize("left", ["", "[0.5", '{"a": 1}', "7"])
def test_a_curve_that_cannot_be_read_begins_anew(train, before, tmp_path, left):
    folder = Workspace(tmp_path).checkpoints / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "learning_curve.json").write_text(left)
    train(telling((1, 0.5), (2, 0.75)))
    assert train.curve == (before, 0.5, 0.75)


@pytest.mark.parametrize("told", [(0, 0.5), (3, 0.5), (1, float("nan"))])
def test_what_cannot_be_an_epoch_is_told(train, told):
    with pytest.raises(TrainingError, match=rf"epoch_done\({told[0]}, {told[1]}\): "):
        train(telling(told))


@pytest.mark.parametrize("swallows", [True, False])
def test_what_ends_it_is_raised_whatever_it_makes_of_that(train, swallows):
    class EnoughError(Exception):
        pass

    def enough(curve):
        raise EnoughError

    def training(model, job):
        try:
            job.epoch_done(1, 0.5)
        except EnoughError as error:
            if not swallows:
                raise RuntimeError("wrapped") from error

    with pytest.raises(EnoughError):
        train(training, after_epoch=enough)


def test_no_epochs_do_not_call_it(train):
    _, score, trainer = train(raising, FineTune(epochs=0))
    assert score == trainer.task.score(trainer.task.build_model())


def test_stages_are_told_apart_by_its_name(tiny_task, tmp_path):
    def identity(**changes):
        runner = StageRunner(
            tiny_task(**changes),
            Workspace(tmp_path),
            seed=0,
            device=torch.device("cpu"),
            progress=Progress(),
        )
        return runner.identity

    assert identity() == identity(training=None)
    assert identity(training=by_hand)["training"] == "by_hand"


@pytest.mark.parametrize(("tuning", "trainings"), [(None, 1), (FineTune(epochs=1), 2)])
def test_a_function_that_does_not_look_is_stopped_when_its_work_is_stored(
    tiny_task, tmp_path, tuning, trainings
):
    """Otherwise the first Ctrl-C would be forgotten, and the search would go on."""
    trained, stop = [], StopSwitch()

    def heedless(model, job):
        trained.append(1)
        stop.requested = True

    def run():
        runner = StageRunner(
            tiny_task(training=heedless),
            Workspace(tmp_path).prepare(),
            seed=0,
            device=torch.device("cpu"),
            progress=Progress(),
            stop=stop,
        )
        method = Compress(
            method="spatial_svd",
            mac_ratio=0.7,
            selection="uniform",
            samples=16,
            per_layer_fine_tune=tuning,
        )
        return runner.run(Recipe((method, FineTune(epochs=1))))

    for done in range(1, trainings + 1):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert len(trained) == done
        stop.requested = False
    assert all(result.reused for result in run()) and len(trained) == trainings
