"""What the settings of fine-tuning do, each against what it is equivalent to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from compress_search.exceptions import TaskError, TrainingError
from compress_search.fingerprint import model_fingerprint
from compress_search.progress import Progress
from compress_search.recipe import OPTIMISERS, FineTune
from compress_search.training import optimisers
from compress_search.training.fine_tuning import fine_tune
from compress_search.training.readiness import check_training

CPU = torch.device("cpu")
PLAIN = {"epochs": 1, "momentum": 0, "weight_decay": 0, "distillation": 0, "gradient_clip": None}


def trained(task, model, teacher=None, **settings):
    done = fine_tune(model, teacher, task, FineTune(**PLAIN | settings), seed=0, progress=Progress())
    return model, done.accuracy


def largest_difference(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((one - two).abs().max().item() for one, two in pairs)


def rising():
    """An evaluation that always prefers what was trained the longest."""
    scores = iter(range(1000))
    return lambda model, loader: float(next(scores))


def test_every_optimiser_that_can_be_named_exists():
    assert set(optimisers.OPTIMISERS) == set(OPTIMISERS)


def test_adamw_is_its_closed_form_in_the_first_step(tiny_task):
    # Loshchilov & Hutter (2019), algorithm 2: the first step is the gradient's sign, and weights alone decay.
    inputs, targets = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    task = tiny_task(train=[(inputs, targets)], loss=lambda outputs, _: outputs.sum(), evaluate=rising())
    model = nn.Linear(4, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    trained(task, model, optimiser="adamw", momentum=0.9, lr=0.01, weight_decay=0.1, warmup=0)
    sign = inputs.sum(dim=0).sign().expand(2, 4)
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.01 * 0.1) - 0.01 * sign)
    torch.testing.assert_close(model.bias.detach(), bias - 0.01)


def test_smoothed_labels_are_those_of_the_loss_itself(tiny_task, tiny_net):
    smoothing = nn.CrossEntropyLoss(label_smoothing=0.2)
    by_setting, _ = trained(tiny_task(evaluate=rising()), tiny_net(), label_smoothing=0.2)
    by_loss, _ = trained(tiny_task(evaluate=rising(), loss=smoothing), tiny_net())
    without, _ = trained(tiny_task(evaluate=rising()), tiny_net())
    assert model_fingerprint(by_setting) == model_fingerprint(by_loss) != model_fingerprint(without)


def test_smoothing_leaves_the_tasks_own_loss_alone(tiny_task, tiny_net):
    task = tiny_task()
    trained(task, tiny_net(), label_smoothing=0.2)
    assert task.loss.label_smoothing == 0


def test_the_average_is_what_is_evaluated_and_kept(tiny_task, tiny_net):
    seen = []

    def evaluate(model, loader):
        seen.append(model_fingerprint(model))
        return float(len(seen))

    task = tiny_task(evaluate=evaluate)
    plain, _ = trained(task, tiny_net(), lr=0.1)
    seen.clear()
    averaged, _ = trained(task, tiny_net(), lr=0.1, ema=0.9)
    assert seen[-1] == model_fingerprint(averaged) != model_fingerprint(plain)
    # Behind the weights themselves, and before where they began.
    start = tiny_net()
    assert largest_difference(averaged, start) < largest_difference(plain, start)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics_stay_and_their_weights_learn(tiny_task, tiny_net, frozen):
    start = tiny_net()
    model, _ = trained(tiny_task(evaluate=rising()), tiny_net(), lr=0.1, freeze_batch_norm=frozen)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(model.state_dict()[name], start.state_dict()[name]) == frozen
    assert not torch.equal(model[1].weight, start[1].weight)


def test_the_layout_changes_no_more_than_rounding(tiny_task):
    layouts = []

    class Watching(nn.Sequential):
        def forward(self, inputs):
            if self.training:
                layouts.append(inputs.is_contiguous(memory_format=torch.channels_last))
            return super().forward(inputs)

    models = []
    for last in (True, False):
        # Of a single channel, the layouts could not be told from each other.
        net = Watching(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
        torch.manual_seed(0)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
        batches = [(torch.randn(8, 2, 6, 6), torch.arange(8) % 3)]
        task = tiny_task(model=net, train=batches, validation=batches, example_input=batches[0][0])
        models.append(trained(task, net, lr=0.1, channels_last=last)[0])
        assert all(parameter.is_contiguous() for parameter in net.parameters())
    assert layouts == [True, False]
    assert largest_difference(*models) < 1e-5


def test_a_model_that_needs_its_images_as_they_are_gets_them_so(tiny_task):
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(48, 3)

        def forward(self, inputs):
            return self.head(self.conv(inputs).view(len(inputs), -1))

    batches = [(torch.randn(8, 2, 6, 6), torch.arange(8) % 3)]
    task = tiny_task(train=batches, validation=batches, example_input=batches[0][0], evaluate=rising())
    model = Viewing()
    before = model.head.weight.detach().clone()
    trained(task, model, channels_last=True)
    assert not torch.equal(model.head.weight, before)


def test_losses_are_computed_in_full_precision(tiny_task, tiny_net):
    """Some refuse anything else on a GPU, BCELoss among them."""
    seen = []

    def loss(outputs, labels):
        seen.append((outputs.dtype, labels.dtype, torch.is_autocast_enabled("cpu")))
        return nn.functional.binary_cross_entropy(
            outputs.sigmoid(), nn.functional.one_hot(labels, 3).to(outputs.dtype)
        )

    trained(tiny_task(loss=loss), tiny_net(), precision="bfloat16")
    assert set(seen) == {(torch.float32, torch.int64, False)}


def test_mixed_precision_runs_the_model_in_it(tiny_task, tiny_net):
    types = set()
    net = tiny_net()
    net[-1].register_forward_hook(
        lambda module, _, output: types.add(output.dtype) if module.training else None
    )
    model, _ = trained(tiny_task(evaluate=lambda model, loader: 0.0), net, precision="bfloat16")
    assert types == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    types.clear()
    trained(tiny_task(evaluate=lambda model, loader: 0.0), net, precision="auto")
    assert types == {torch.float32}


def test_training_without_labels_is_that_with_labels_nobody_looks_at(tiny_task, tiny_net):
    batches = list(tiny_task().train)
    unlabelled = [inputs for inputs, _ in batches]
    wrapped = [(inputs,) for inputs, _ in batches]
    found = set()
    for train in (batches, unlabelled, wrapped):
        task = tiny_task(train=train, evaluate=rising())
        task.check(task.build_model(), CPU)
        check_training(task, [FineTune(distillation=1)], CPU)
        model, _ = trained(task, tiny_net(), tiny_net(seed=1), distillation=1.0)
        found.add(model_fingerprint(model))
    assert len(found) == 1


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tiny_task, tiny_net):
    plain, _ = trained(tiny_task(evaluate=rising()), tiny_net())
    compiled, _ = trained(tiny_task(evaluate=rising()), tiny_net(), compile=True)
    assert largest_difference(plain, compiled) < 1e-4
    assert not torch.equal(plain[0].weight, tiny_net()[0].weight)


# What a task does not allow is said before any work


MADE = ("unlabelled", "frozen", "wrapped")
"""Changes of a task that are made of it."""


class InADict(nn.Module):
    """Returns what a model does in a dictionary, as segmentation networks of torchvision do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return {"out": self.model(inputs)}


def test_data_that_no_seed_reaches_are_told_once_and_accepted(tiny_task, caplog):
    class Noisy(list):
        noise = np.random.default_rng()

        def __iter__(self):
            for inputs, labels in super().__iter__():
                yield inputs + torch.as_tensor(self.noise.normal(size=inputs.shape)).float(), labels

    task = tiny_task()
    check_training(task, [FineTune()], CPU)
    assert not caplog.records
    check_training(replace(task, train=Noisy(task.train)), [FineTune(), FineTune(epochs=3)], CPU)
    (record,) = caplog.records
    assert "The first batch of train is another one each time, even under the same seed" in record.message


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        ({"distillation": 0.5}, {"unlabelled": True}, r"distillation is 0\.5.*Set it to 1"),
        (
            {"label_smoothing": 0.1},
            {"loss": nn.MSELoss()},
            r"loss \(MSELoss\) is not torch\.nn\.CrossEntropy",
        ),
        ({"precision": "float16"}, {}, r"precision is 'float16', but the model is trained on cpu"),
        ({"options": {"a": 1}}, {}, r"options is \{'a': 1\}.*Task\(training=\.\.\.\)"),
        ({}, {"frozen": True}, r"no parameter of the model requires a gradient.*requires_grad_\(\)"),
        ({}, {"wrapped": True}, r"returns a dict, which cannot be distilled.*distillation to 0"),
    ],
)
def test_what_the_task_does_not_allow_is_refused(tiny_task, settings, changes, words):
    task = tiny_task(**{name: change for name, change in changes.items() if name not in MADE})
    if "unlabelled" in changes:
        task = replace(task, train=[inputs for inputs, _ in task.train])
    if "frozen" in changes:
        task = replace(task, model=task.build_model().requires_grad_(False))
    if "wrapped" in changes:
        task = replace(task, model=InADict(task.build_model()))
    with pytest.raises(TaskError, match=words):
        check_training(task, [None, FineTune(epochs=0, **settings), FineTune(**settings)], CPU)
    check_training(task, [None, FineTune(epochs=0, **settings)], CPU)


def test_the_user_is_told_of_missing_labels_in_training_too(tiny_task, tiny_net):
    task = tiny_task(train=[inputs for inputs, _ in tiny_task().train])
    with pytest.raises(TrainingError, match="yields no targets"):
        trained(task, tiny_net())
