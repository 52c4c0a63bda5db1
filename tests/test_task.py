"""The user's side: what is wrong with it is found before any work starts, and said in plain words."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

from compress_search.exceptions import EvaluationError, TaskError
from compress_search.fingerprint import model_fingerprint
from compress_search.loaders import inputs_of
from compress_search.task import accuracy

CPU = torch.device("cpu")


class Constant(nn.Module):
    """Says class 1 whatever it sees."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 1.0, 0.5]))

    def forward(self, inputs):
        return self.logits.expand(len(inputs), 3)


def faults_of(task):
    with pytest.raises(TaskError, match=f"The task '{task.name}' cannot be used:") as caught:
        task.check(task.build_model(), CPU)
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


def test_accuracy_is_the_share_of_right_answers():
    labels = torch.tensor([1, 1, 0, 2, 1])
    batches = [(torch.zeros(3, 2), labels[:3]), (torch.zeros(2, 2), labels[3:])]
    assert accuracy(Constant(), batches) == 3 / 5


def test_every_place_of_an_image_has_a_label_of_its_own():
    outputs = torch.tensor([[[0.0, 2.0]], [[1.0, 1.0]]]).movedim(0, 1)
    model = nn.Sequential(nn.Conv1d(2, 2, 1, bias=False))
    model[0].weight.data = torch.eye(2)[:, :, None]
    assert outputs.shape == (1, 2, 2)
    assert accuracy(model, [(outputs, torch.tensor([[1, 1]]))]) == 0.5


@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        ((4, 1), torch.zeros(4, 1)),
        ((4, 1), torch.zeros(4)),
        ((4,), torch.zeros(4)),
        ((4, 3), torch.zeros(4, 3)),
        ((4, 3, 5), torch.zeros(4)),
        ((4, 3), [0, 1, 2, 0]),
    ],
)
def test_what_is_no_classifiers_has_no_accuracy(tiny_task, shape, labels):
    task = tiny_task(validation=[(torch.zeros(shape), labels)])
    model = nn.Sequential(nn.Identity(), nn.PReLU())
    with pytest.raises(EvaluationError, match=r"are not those of a classifier.*Task\(evaluate=...\)"):
        task.score(model)


def test_accuracy_of_nothing_is_not_a_number():
    assert math.isnan(accuracy(Constant(), []))


def test_a_good_task_passes_and_its_model_stays(tiny_task):
    task = tiny_task()
    before = model_fingerprint(task.model)
    task.check(task.build_model(), CPU)
    assert model_fingerprint(task.model) == before
    assert task.model.training


def test_built_models_are_copies_in_evaluation_mode(tiny_task, tiny_net):
    original = tiny_net()
    for task in (tiny_task(model=original), tiny_task(model=lambda: original)):
        built = task.build_model()
        assert built is not original
        assert not built.training
        assert original.training
        assert model_fingerprint(built) == model_fingerprint(original)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.zeros(3), r"Task\.model is a Tensor\. Give a torch\.nn\.Module"),
        (lambda: {"weight": 1}, r"returned a dict, not a torch\.nn\.Module"),
        (nn.Linear, r"The function given as Task\.model raised TypeError: Linear\.__init__\(\) missing 2"),
    ],
)
def test_what_is_not_a_model_is_refused(tiny_task, model, message):
    with pytest.raises(TaskError, match=message):
        tiny_task(model=model).build_model()


class Wrapped(nn.Module):
    """What torch.compile returns, without the time that importing the compiler takes."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, inputs):
        return self._orig_mod(inputs)


def test_a_compiled_model_is_refused(tiny_task, tiny_net):
    net = tiny_net()
    with pytest.raises(TaskError, match="It is a Wrapped, which is compiled: .* Give its _orig_mod"):
        tiny_task(model=Wrapped(net)).build_model()
    with pytest.raises(TaskError, match="Its layer '1' is a Wrapped, which is compiled"):
        tiny_task(model=nn.Sequential(nn.Identity(), Wrapped(net))).build_model()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        traced = torch.jit.trace(net.eval(), torch.zeros(1, 1, 6, 6))
    with pytest.raises(TaskError, match="It is a TopLevelTracedModule, .* Give the module that it was made"):
        tiny_task(model=traced).build_model()


@pytest.mark.parametrize("name", ["train", "validation"])
def test_a_loader_that_there_must_be_is_missed(tiny_task, name):
    (fault,) = faults_of(tiny_task(**{name: None}))
    assert fault == f"{name} is a NoneType, which cannot be iterated. Give a DataLoader."


@pytest.mark.parametrize("name", ["evaluate", "loss", "training"])
def test_what_cannot_be_called_is_told_before_it_is(tiny_task, name):
    (fault,) = faults_of(tiny_task(**{name: "mine"}))
    assert fault == f"{name} is 'mine', which cannot be called. Give a function, or leave it out."


@pytest.mark.parametrize("name", ["train", "validation", "test", "calibration"])
@pytest.mark.parametrize(
    "loader", [[], DataLoader(TensorDataset(torch.zeros(0, 1), torch.zeros(0)), batch_size=4)]
)
def test_an_empty_loader_is_named(tiny_task, name, loader):
    assert faults_of(tiny_task(**{name: loader})) == [f"{name} is empty: it yields no batch."]


@pytest.mark.parametrize("name", ["train", "validation", "test", "calibration"])
def test_an_iterator_is_refused_untouched(tiny_task, name):
    batches = iter([(torch.zeros(2, 1, 6, 6), torch.zeros(2, dtype=torch.long))])
    (fault,) = faults_of(tiny_task(**{name: batches}))
    assert fault.startswith(f"{name} is an iterator that ends after one pass. Give a DataLoader")
    assert len(list(batches)) == 1


class Broken:
    def __iter__(self):
        raise FileNotFoundError("images/0.png")


class Once:
    """An iterable that can be gone through a single time."""

    def __init__(self, batches):
        self.left = iter(batches)

    def __iter__(self):
        return self.left


@pytest.mark.parametrize(
    ("loader", "fault"),
    [
        (3, "validation is a int, which cannot be iterated. Give a DataLoader."),
        (Broken(), "validation raised when its first batch was drawn: FileNotFoundError: images/0.png"),
        (
            [torch.zeros(2, 1, 6, 6)],
            "validation yields Tensor; it must yield (inputs, targets) with a tensor of inputs.",
        ),
        (
            [{"inputs": torch.zeros(2, 1, 6, 6)}],
            "validation yields dict; it must yield (inputs, targets) with a tensor of inputs.",
        ),
        (
            [(torch.zeros(2, 1, 6, 6), [0, 1])],
            "validation yields targets that are a list; they must be a tensor: torch.as_tensor(targets).",
        ),
        (
            Once([(torch.zeros(2, 1, 6, 6), torch.zeros(2))]),
            "validation is a Once that gives the same iterator each time, which ends after one pass. Give a "
            "DataLoader or a list of batches.",
        ),
    ],
)
def test_a_loader_that_yields_no_batches_is_refused(tiny_task, loader, fault):
    assert faults_of(tiny_task(validation=loader)) == [fault]


def test_what_only_the_users_evaluate_reads_may_be_anything(tiny_task):
    batches = [{"inputs": torch.zeros(2, 1, 6, 6), "labels": [0, 1]}]
    task = tiny_task(validation=batches, test=batches, evaluate=lambda model, loader: 0.5)
    task.check(task.build_model(), CPU)
    assert len(faults_of(tiny_task(train=batches, evaluate=lambda model, loader: 0.5))) == 1


def test_what_is_trained_on_may_be_of_another_size_where_calibration_is_given(tiny_task):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).eval()
    parts = [(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))]
    device = torch.device("cpu")
    tiny_task(model=model, train=parts, calibration=[torch.zeros(2, 1, 6, 6)]).check(model, device)
    with pytest.raises(TaskError, match=r"train yields inputs of shape \(2, 1, 4, 4\)"):
        tiny_task(model=model, train=parts).check(model, device)
    with pytest.raises(TaskError, match=r"calibration yields inputs of shape \(2, 1, 4, 4\)"):
        tiny_task(model=model, calibration=parts).check(model, device)


def test_calibration_needs_no_labels(tiny_task):
    task = tiny_task(calibration=[torch.zeros(2, 1, 6, 6)])
    task.check(task.build_model(), CPU)
    assert [tuple(batch.shape) for batch in task.calibration_inputs(8)] == [(2, 1, 6, 6)]


def test_all_faults_come_together(tiny_task):
    faults = faults_of(tiny_task(train=[], validation=3, example_input=[1.0]))
    assert faults == [
        "train is empty: it yields no batch.",
        "validation is a int, which cannot be iterated. Give a DataLoader.",
        "example_input is a list, not a torch.Tensor.",
    ]


def test_an_example_of_another_shape_than_the_data_is_refused(tiny_task):
    (fault,) = faults_of(tiny_task(example_input=torch.zeros(1, 3, 6, 6)))
    assert "(1, 3, 6, 6)" in fault
    assert "(16, 1, 6, 6)" in fault


def test_a_model_that_does_not_run_on_the_example_is_refused(tiny_task):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    (fault,) = faults_of(tiny_task(model=model))
    assert fault.startswith("The model does not run on example_input of shape (1, 1, 6, 6): RuntimeError")


@pytest.mark.parametrize("classes", [1, 2])
def test_too_few_outputs_for_the_labels_are_refused(tiny_task, tiny_net, classes):
    (fault,) = faults_of(tiny_task(model=tiny_net(classes=classes)))
    assert fault.startswith(
        "The model's output does not fit train's targets of shape (16,) and type torch.int64"
    )
    assert "IndexError" in fault


def test_targets_of_another_shape_than_the_output_are_refused(tiny_task):
    images, labels = torch.zeros(8, 1, 6, 6), torch.zeros(8, 2, dtype=torch.long)
    (fault,) = faults_of(tiny_task(train=[(images, labels)]))
    assert fault.startswith("The model's output does not fit train's targets of shape (8, 2)")


@pytest.mark.parametrize(
    ("loss", "seen"),
    [
        (lambda outputs, targets: outputs.sum(dim=1), "a tensor of shape (16,)"),
        (lambda outputs, targets: torch.tensor(math.nan), "tensor(nan)"),
        (lambda outputs, targets: 0.5, "0.5"),
    ],
)
def test_a_loss_that_is_not_one_finite_number_is_refused(tiny_task, loss, seen):
    assert faults_of(tiny_task(loss=loss)) == [
        f"The loss of the first training batch is {seen}, not a tensor of one finite number."
    ]


def test_the_loss_follows_the_device_and_the_original_stays(tiny_task):
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3))
    task = tiny_task(loss=weighted)
    assert task.loss_on(torch.device("meta")).weight.device.type == "meta"
    assert weighted.weight.device.type == "cpu"
    assert tiny_task(loss=nn.functional.cross_entropy).loss_on(CPU) is nn.functional.cross_entropy


def returning(value):
    def evaluate(model, loader):
        return value

    return evaluate


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        "0.9",
        None,
        True,
        [0.9],
        {},
        torch.tensor([0.1, 0.2]),
        torch.tensor(math.nan),
    ],
)
def test_a_score_that_is_not_a_finite_number_is_refused(tiny_task, value):
    task = tiny_task(evaluate=returning(value))
    with pytest.raises(
        EvaluationError, match=r"evaluate \(evaluate\) returned .*not a finite number.*higher is"
    ):
        task.score(task.build_model())


@pytest.mark.parametrize("value", [0.5, 1, -3.0, torch.tensor(0.5), torch.tensor([[2]])])
def test_any_finite_number_is_a_score(tiny_task, value):
    task = tiny_task(evaluate=returning(value))
    assert task.score(task.build_model()) == float(value)


def test_an_evaluation_that_raises_is_reported_with_its_cause(tiny_task):
    def top_five(model, loader):
        raise KeyError("logits")

    with pytest.raises(EvaluationError, match=r"evaluate \(top_five\) raised KeyError: 'logits'") as caught:
        tiny_task(evaluate=top_five).score(nn.Identity())
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_score_is_of_the_validation_data_unless_told_otherwise(tiny_task):
    seen = []
    task = tiny_task(evaluate=lambda model, loader: seen.append(loader) or 1.0, test=[1])
    task.score(nn.Identity())
    task.score(nn.Identity(), task.test)
    assert seen == [task.validation, task.test]


@pytest.mark.parametrize("samples", [1, 16, 40, 64, 1000])
def test_calibration_draws_as_many_samples_as_asked_or_as_there_are(tiny_task, samples):
    task = tiny_task()
    drawn = torch.cat(task.calibration_inputs(samples))
    assert drawn.shape == (min(samples, 64), 1, 6, 6)
    assert len(drawn.flatten(1).unique(dim=0)) == len(drawn)


def test_calibration_is_fixed_by_its_seed(tiny_task):
    task = tiny_task()
    first, again, other = (torch.cat(task.calibration_inputs(20, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_calibration_uses_its_own_loader_with_or_without_labels(tiny_task):
    inputs = torch.randn(4, 1, 6, 6)
    for loader in ([inputs], [(inputs, torch.zeros(4))]):
        (batch,) = tiny_task(calibration=loader).calibration_inputs(8)
        assert torch.equal(batch, inputs)


def test_calibration_with_nothing_to_draw_is_refused(tiny_task):
    with pytest.raises(TaskError, match="calibration loader yields no example"):
        tiny_task(calibration=[]).calibration_inputs(8)


def test_a_model_that_cannot_be_copied_is_told(tiny_task):
    model = nn.Sequential(nn.Conv2d(1, 3, 3))
    model.made = model(torch.zeros(1, 1, 6, 6)) * 1
    with pytest.raises(TaskError, match="Task.model, a Sequential, cannot be copied: RuntimeError"):
        tiny_task(model=model).build_model()


def test_inputs_are_the_first_of_each_batch():
    inputs = torch.zeros(2)
    found = list(inputs_of([inputs, (inputs, 1, 2), [inputs]]))
    assert [batch is inputs for batch in found] == [True] * 3


def in_batches_by_its_sampler(data):
    sampler = BatchSampler(SequentialSampler(data), 20, drop_last=False)
    return DataLoader(data, sampler=sampler, batch_size=None)


def in_batches_by_a_batch_sampler(data):
    return DataLoader(data, batch_sampler=BatchSampler(range(32), 5, drop_last=False))


def without_the_rest(data):
    return DataLoader(ConcatDataset([data, TensorDataset(*data[:3])]), batch_size=8, drop_last=True)


def as_a_stream(data):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data)

    return DataLoader(Stream(), batch_size=5)


@pytest.mark.parametrize(
    "make",
    [
        partial(DataLoader, batch_size=7),
        in_batches_by_its_sampler,
        in_batches_by_a_batch_sampler,
        without_the_rest,
        as_a_stream,
        lambda data: [data[:30], data[30:]],
    ],
)
def test_an_accuracy_has_the_standard_error_of_a_share(tiny_task, make):
    task = tiny_task(validation=make(tiny_task().validation.dataset))
    # Of 32 images that are right with a chance of 0.75, drawn again and again.
    generator = torch.Generator().manual_seed(0)
    shares = (torch.rand(20_000, 32, generator=generator) < 0.75).double().mean(dim=1)
    assert task.standard_error(0.75) == pytest.approx(float(shares.std()), rel=0.02)
    assert task.standard_error(1.0) == task.standard_error(0.0) == 0


def test_of_another_evaluation_no_standard_error_is_known(tiny_task):
    assert tiny_task(evaluate=lambda *_: 0.75).standard_error(0.75) == 0
