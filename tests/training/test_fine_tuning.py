"""Fine-tuning: its steps against their closed forms, its best epoch, its repeatability."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from compress_search.exceptions import EvaluationError, TrainingError
from compress_search.fingerprint import model_fingerprint
from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.stopping import StopSwitch
from compress_search.task import Task
from compress_search.training.fine_tuning import fine_tune
from compress_search.training.schedules import learning_rate_factor
from compress_search.training.trainer import Trainer
from compress_search.workspace import Workspace

PLAIN = FineTune(epochs=1, lr=0.1, momentum=0, weight_decay=0, distillation=0, gradient_clip=None)


def changed(settings, **changes):
    return FineTune(**vars(settings) | changes)


def run(model, teacher, task, settings, *, seed=0):
    return fine_tune(model, teacher, task, settings, seed=seed, progress=Progress()).accuracy


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# One step


class Slope(nn.Module):
    """Its output is its input times a weight, plus a bias and a normalisation that get no gradient."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(3)
        nn.init.normal_(self.norm.weight)

    def forward(self, inputs):
        return self.layer(inputs)


def one_batch_task(tiny_task, loss, *, batches=1):
    inputs, targets = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    return tiny_task(train=[(inputs, targets)] * batches, loss=loss, evaluate=lambda model, loader: 0.0)


def test_a_step_is_nesterovs_and_its_gradient_is_clipped(tiny_task):
    task = one_batch_task(tiny_task, lambda outputs, targets: 1e6 * outputs.sum())
    model = Slope()
    before = torch.cat([p.detach().flatten() for p in model.layer.parameters()])
    run(model, None, task, changed(PLAIN, lr=0.3, momentum=0.9, gradient_clip=2.0))
    after = torch.cat([p.detach().flatten() for p in model.layer.parameters()])
    # The first step with momentum mu goes lr (1 + mu) along the gradient, whose norm is cut to 2.
    torch.testing.assert_close((after - before).norm(), torch.tensor(0.3 * 1.9 * 2.0))


def test_only_weights_decay(tiny_task):
    task = one_batch_task(tiny_task, lambda outputs, targets: 0 * outputs.sum(), batches=3)
    model = Slope()
    before = state_of(model)
    run(model, None, task, changed(PLAIN, epochs=2, lr=0.5, weight_decay=0.1, warmup=0.0))
    shrunk = math.prod(
        1 - 0.5 * 0.1 * learning_rate_factor(step, 6, FineTune(warmup=0.0)) for step in range(6)
    )
    torch.testing.assert_close(model.layer.weight.detach(), shrunk * before["layer.weight"])
    for name in ("layer.bias", "norm.weight", "norm.bias"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_frozen_parameters_stay(tiny_task, tiny_net):
    model = tiny_net()
    model[0].weight.requires_grad_(False)
    before = state_of(model)
    run(model, None, tiny_task(), changed(PLAIN, weight_decay=0.1))
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


# Distillation


def linear_task(tiny_task):
    return tiny_task(model=nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))


def test_a_model_that_equals_its_teacher_learns_nothing_of_it(tiny_task):
    task = linear_task(tiny_task)
    model = task.build_model()
    before = state_of(model)
    run(model, task.build_model(), task, changed(PLAIN, distillation=1.0))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


def test_the_two_losses_are_weighted(tiny_task):
    task, moved = linear_task(tiny_task), {}
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    task = tiny_task(model=task.model, train=[next(iter(task.train))])
    for weight in (0.0, 0.25, 1.0):
        model = task.build_model()
        run(
            model,
            teacher,
            tiny_task(train=task.train, evaluate=lambda *_: 0.0),
            changed(PLAIN, distillation=weight),
        )
        moved[weight] = model[1].weight.detach() - task.model[1].weight.detach()
    torch.testing.assert_close(moved[0.25], 0.75 * moved[0.0] + 0.25 * moved[1.0])
    assert not torch.allclose(moved[0.0], moved[1.0])


def test_without_distillation_the_teacher_is_not_asked(tiny_task):
    class Refusing(nn.Module):
        def forward(self, inputs):
            raise AssertionError("asked")

    task = tiny_task()
    run(task.build_model(), Refusing(), task, PLAIN)
    with pytest.raises(TrainingError, match="asked"):
        run(task.build_model(), Refusing(), task, changed(PLAIN, distillation=0.5))


def test_the_teacher_is_left_as_it_was(tiny_task, tiny_net):
    teacher = tiny_net(seed=3).train()
    before = model_fingerprint(teacher)
    run(tiny_net(), teacher, tiny_task(), FineTune(epochs=1))
    assert teacher.training
    assert model_fingerprint(teacher) == before
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_regression_is_distilled_too(tiny_task):
    def negative_error(model, loader):
        return -sum(nn.functional.mse_loss(model(x), y).item() for x, y in loader)

    inputs = torch.randn(32, 5)
    batches = [(inputs, inputs.sum(dim=1, keepdim=True))]
    teacher, model = nn.Linear(5, 1), nn.Linear(5, 1)
    nn.init.ones_(teacher.weight)
    nn.init.zeros_(teacher.bias)
    task = tiny_task(train=batches, validation=batches, loss=nn.MSELoss(), evaluate=negative_error)
    before = task.score(model)
    assert run(model, teacher, task, FineTune(epochs=60, lr=0.1)) > before / 100


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, inputs):
        return self.layer(inputs), inputs


@pytest.mark.parametrize(
    ("model", "teacher"), [(Pair(), Pair()), (Slope(), Pair()), (Slope(), nn.Linear(4, 3))]
)
def test_outputs_that_cannot_be_compared_are_refused(tiny_task, model, teacher):
    def loss(outputs, targets):
        return (outputs[0] if isinstance(outputs, tuple) else outputs).sum()

    with pytest.raises(TrainingError, match=r"cannot be distilled.*Set fine_tune\.distillation to 0"):
        run(model, teacher, one_batch_task(tiny_task, loss), changed(PLAIN, distillation=0.5))


# The best epoch


def scripted(scores):
    """An evaluation that gives the scores one after the other, and the states it was asked about."""
    remaining, states = list(scores), []

    def evaluate(*given):
        states.append(state_of(next(one for one in given if isinstance(one, nn.Module))))
        return remaining.pop(0)

    return evaluate, states


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.5, 0.7, 0.9, 0.8], 2),
        ([0.9, 0.5, 0.4, 0.8], 0),
        ([0.5, 0.6, 0.7, 0.7], 3),
        ([0.5, 0.5, 0.5, 0.4], 2),
    ],
)
def test_the_best_weights_and_statistics_stay(tiny_task, scores, best):
    evaluate, states = scripted(scores)
    task = tiny_task(evaluate=evaluate)
    model = task.build_model()
    assert run(model, None, task, changed(PLAIN, epochs=3)) == scores[best]
    assert len(states) == 4
    assert not torch.equal(states[0]["1.running_mean"], states[3]["1.running_mean"])
    assert_same_state(model, states[best])
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        # With 32 validation images the standard error of 0.9 is 0.053.
        ([0.5, 0.7, 0.9, 0.85], 3),
        ([0.5, 0.7, 0.9, 0.84], 2),
        ([0.9, 0.5, 0.6, 0.85], 3),
        ([0.9, 0.5, 0.6, 0.84], 0),
        # Only the last epoch may be below the best.
        ([0.5, 0.9, 0.88, 0.7], 1),
    ],
)
def test_the_last_weights_stay_within_a_standard_error_of_the_best(tiny_task, monkeypatch, scores, kept):
    scripted_score, states = scripted(scores)
    monkeypatch.setattr(Task, "score", scripted_score)
    task = tiny_task()
    model = task.build_model()
    assert run(model, None, task, changed(PLAIN, epochs=3)) == scores[kept]
    assert_same_state(model, states[kept])


def test_training_raises_the_accuracy(tiny_task, tiny_net):
    task = tiny_task()
    model = tiny_net()
    before = task.score(model)
    after = run(model, None, task, FineTune(epochs=8, lr=0.1, distillation=0.0))
    assert after > max(0.9, before)
    assert task.score(model) == after


def test_no_epochs_change_nothing(tiny_task, tiny_net):
    task, model = tiny_task(), tiny_net()
    before = model_fingerprint(model)
    assert run(model, None, task, changed(PLAIN, epochs=0)) == task.score(model)
    assert model_fingerprint(model) == before
    assert not model.training


# Repeating it


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(tiny_task, tiny_net):
    def train(seed, drawn):
        task = tiny_task()
        model = nn.Sequential(*tiny_net()[:-1], nn.Dropout(), tiny_net()[-1])
        torch.manual_seed(drawn)
        run(model, tiny_net(seed=1), task, FineTune(epochs=2, lr=0.05), seed=seed)
        return model_fingerprint(model)

    assert train(0, 1) == train(0, 2) != train(1, 1)


def test_the_users_random_state_is_left_alone(tiny_task, tiny_net):
    model, task = tiny_net(), tiny_task(train=list(tiny_task().train))
    state = torch.get_rng_state()
    run(model, None, task, changed(PLAIN, epochs=2))
    assert torch.equal(torch.get_rng_state(), state)


class Stream(IterableDataset):
    """The batches of a list, without saying how many there are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_loader_without_length_trains_as_one_with(tiny_task, tiny_net):
    batches = list(tiny_task().train)
    models = [tiny_net(), tiny_net()]
    for model, train in zip(models, (batches, DataLoader(Stream(batches), batch_size=None)), strict=True):
        run(model, None, tiny_task(train=train), changed(PLAIN, epochs=2))
    assert model_fingerprint(models[0]) == model_fingerprint(models[1])


def test_more_than_inputs_and_targets_may_come(tiny_task, tiny_net):
    batches = list(tiny_task().train)
    longer = [(inputs, labels, "names", 7) for inputs, labels in batches]
    models = [tiny_net(), tiny_net()]
    for model, train in zip(models, (batches, longer), strict=True):
        run(model, None, tiny_task(train=train), PLAIN)
    assert model_fingerprint(models[0]) == model_fingerprint(models[1])


# What can go wrong, and what is shown


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_training(tiny_task, value):
    task = tiny_task(loss=lambda outputs, targets: outputs.sum() * value)
    with pytest.raises(TrainingError, match=r"loss of epoch 1 is .*Lower fine_tune\.lr \(it is 0\.1\)"):
        run(task.build_model(), None, task, PLAIN)


def test_a_model_without_trainable_parameters_is_refused(tiny_task, tiny_net):
    with pytest.raises(TrainingError, match="No parameter of Sequential requires a gradient"):
        run(tiny_net().requires_grad_(False), None, tiny_task(), PLAIN)


def test_an_evaluation_that_fails_is_not_hidden(tiny_task, tiny_net):
    evaluate, _ = scripted([0.5, math.nan])
    with pytest.raises(EvaluationError, match="nan"):
        run(tiny_net(), None, tiny_task(evaluate=evaluate), PLAIN)


def test_every_epoch_is_shown(tiny_task, tiny_net, caplog):
    caplog.set_level(logging.INFO, logger="compress_search")
    evaluate, _ = scripted([0.1, 0.25, 0.5])
    run(copy.deepcopy(tiny_net()), None, tiny_task(evaluate=evaluate), changed(PLAIN, epochs=2))
    first, second = caplog.messages
    assert first.startswith("epochs 1/2: accuracy 0.2500, loss ")
    assert second.startswith("epochs 2/2: accuracy 0.5000, loss ")


# Auxiliary heads


class WithAuxiliaryHead(nn.Module):
    """Returns a pair in training, as GoogLeNet does."""

    def __init__(self, net):
        super().__init__()
        self.net, self.aux = net, nn.Linear(36, 3)

    def forward(self, x):
        return (self.net(x), self.aux(x.flatten(1))) if self.training else self.net(x)


def loss_of_both(outputs, targets):
    if isinstance(outputs, tuple):
        return loss_of_both(outputs[0], targets) + 0.3 * loss_of_both(outputs[1], targets)
    return nn.functional.cross_entropy(outputs, targets)


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_an_auxiliary_head_is_trained_by_a_loss_that_takes_it(tiny_task, tiny_net, distillation):
    task = tiny_task(model=WithAuxiliaryHead(tiny_net()), loss=loss_of_both)
    model = task.build_model()
    task.check(task.build_model(), torch.device("cpu"))
    before = state_of(model)
    settings = FineTune(epochs=4, lr=0.05, distillation=distillation)
    score = run(model, task.build_model(), task, settings)
    assert score > task.score(task.build_model())
    assert not torch.equal(model.aux.weight, before["aux.weight"])


def test_a_loss_that_cannot_take_what_training_returns_is_named(tiny_task, tiny_net):
    task = tiny_task(model=WithAuxiliaryHead(tiny_net()))
    with pytest.raises(
        TrainingError, match=r"WithAuxiliaryHead returns a tuple, which the task's loss cannot"
    ):
        run(task.build_model(), None, task, PLAIN)


def test_another_fault_of_the_loss_is_told_with_its_place(tiny_task):
    calls = []

    def loss(outputs, targets):
        calls.append(outputs)
        if len(calls) == 2:
            raise ZeroDivisionError("no weight")
        return outputs.mean()

    task = tiny_task(loss=loss)
    with pytest.raises(TrainingError, match="raised ZeroDivisionError at batch 2 of epoch 1: no weight"):
        run(task.build_model(), None, task, PLAIN)


@pytest.mark.parametrize("training", [None, lambda model, job: None])
def test_the_same_validation_images_judge_all_epochs(tiny_task, tiny_net, training, tmp_path):
    """Also where the loader shuffles and drops the rest; or luck would choose the best epoch."""
    (images, labels), *_ = tiny_task().validation
    seen = []

    def judge(model, loader):
        seen.append([inputs.clone() for inputs, _ in loader])
        return 0.5

    shuffled = DataLoader(TensorDataset(images, labels), batch_size=12, shuffle=True, drop_last=True)
    task = tiny_task(validation=shuffled, evaluate=judge, training=training)
    trainer = Trainer(task, Workspace(tmp_path), Progress(), 60.0, StopSwitch())
    for _ in range(2):
        trainer.train(tiny_net(), tiny_net(seed=1), FineTune(epochs=2), "01234567", "89abcdef")
        torch.rand(1)
        trainer.forget("01234567")
    assert len(seen) == (6 if training is None else 4)
    for again in seen[1:]:
        torch.testing.assert_close(again, seen[0], rtol=0, atol=0)
