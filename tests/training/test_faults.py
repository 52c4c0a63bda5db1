"""What goes wrong in training: what is tried, and what is told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compress_search.exceptions import EvaluationError, TrainingError
from compress_search.fingerprint import model_fingerprint
from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.training.checkpoints import CheckpointFolder
from compress_search.training.fine_tuning import fine_tune

SETTINGS = FineTune(epochs=3, lr=0.05, distillation=0.0)


def train(task, model, settings=SETTINGS, **options):
    return fine_tune(model, None, task, settings, seed=0, progress=Progress(), **options).accuracy


class Spoiling:
    """A cross-entropy that is ``value`` at some of its calls, counted from 0."""

    def __init__(self, *calls, value=math.nan):
        self.calls, self.value, self.count = set(calls), value, -1

    def __call__(self, outputs, targets):
        self.count += 1
        loss = nn.functional.cross_entropy(outputs, targets)
        return loss * self.value if self.count in self.calls else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_after_one_loss_that_is_not_finite_it_goes_on_from_the_last_epoch(tiny_task, tiny_net, value, caplog):
    # Four batches an epoch: the second epoch is spoilt, and done again.
    caplog.set_level("INFO", logger="compress_search")
    task = tiny_task(loss=Spoiling(5, value=value))
    model = tiny_net()
    score = train(task, model)
    assert score == task.score(model) and task.loss.count == 4 * 4 - 1
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert (
        "goes back to the end of epoch 1 and on with a learning rate of 0.005 in place of 0.05" in caplog.text
    )


def test_the_second_try_is_what_a_lower_rate_gives(tiny_task, tiny_net):
    # Spoilt in its first epoch, everything is trained at a tenth of the rate.
    spoilt, lower = tiny_net(), tiny_net()
    train(tiny_task(loss=Spoiling(2)), spoilt)
    train(tiny_task(loss=Spoiling()), lower, FineTune(epochs=3, lr=0.005, distillation=0.0))
    for name, tensor in spoilt.state_dict().items():
        torch.testing.assert_close(tensor, lower.state_dict()[name])


def test_the_second_time_the_training_ends_with_its_reason(tiny_task, tiny_net):
    with pytest.raises(
        TrainingError,
        match=r"the loss of epoch 2 is nan, with a learning rate of 0\.005 after it was lowered once\. "
        r"Lower fine_tune\.lr \(it is 0\.05\)",
    ):
        train(tiny_task(loss=Spoiling(5, 9)), tiny_net())


def test_a_loss_that_is_not_finite_is_never_kept_in_a_checkpoint(tiny_task, tiny_net, tmp_path):
    undisturbed = tiny_net()
    train(tiny_task(loss=Spoiling(5)), undisturbed)
    model = tiny_net()
    train(tiny_task(loss=Spoiling(5)), model, checkpoints=CheckpointFolder(tmp_path, 1e-9))
    assert model_fingerprint(model) == model_fingerprint(undisturbed)
    for snapshot in CheckpointFolder(tmp_path).load():
        for name, tensor in snapshot.tensors.items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), name


def test_weights_that_are_not_finite_after_a_finite_loss_are_found(tiny_task, tiny_net):
    class Exploding(nn.Module):
        """Its gradient is infinite in its last step of the first epoch, its output is not."""

        def __init__(self, net):
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, inputs):
            if self.training:
                self.calls += 1
                if self.calls == 4:
                    return Infinite.apply(self.net(inputs))
            return self.net(inputs)

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            return inputs.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    model = Exploding(tiny_net())
    train(tiny_task(), model)
    assert model.calls == 4 * 4
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


class Small(nn.Module):
    """Has memory for so many examples at a time, in training."""

    def __init__(self, net, room, error):
        super().__init__()
        self.net, self.room, self.error = net, room, error

    def forward(self, inputs):
        if self.training and len(inputs) > self.room:
            raise self.error
        return self.net(inputs)


MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
)


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_too_large_a_batch_is_added_up_in_parts(tiny_task, error, caplog):
    caplog.set_level("INFO", logger="compress_search")
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    task = tiny_task(model=net)
    whole, parts = task.build_model(), Small(task.build_model(), 5, error)
    train(task, whole)
    train(task, parts)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.net.state_dict()[name], tensor)
    assert "batch of 16: from here on, its gradients are added up over 2 parts" in caplog.text
    assert "over 4 parts" in caplog.text and "over 8 parts" not in caplog.text


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_where_not_even_one_example_fits_the_training_ends_with_its_reason(tiny_task, tiny_net, error):
    with pytest.raises(TrainingError, match=r"not enough memory to train Small on a single example of shape"):
        train(tiny_task(), Small(tiny_net(), 0, error))


def test_a_mask_of_infinite_values_is_no_fault(tiny_task, tiny_net):
    model = tiny_net()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    train(tiny_task(), model)
    assert model.mask[1] == -torch.inf


def test_a_statistic_that_is_not_finite_is_a_fault(tiny_task, tiny_net):
    model = tiny_net()
    model[1].running_mean[0] = torch.nan
    with pytest.raises(TrainingError, match="weights are not finite after epoch 1"):
        train(tiny_task(), model)


def test_an_evaluation_that_raises_is_told_with_its_epoch(tiny_task, tiny_net):
    scores = iter([0.5, 0.6])
    words = r"^In fine-tuning, after epoch 2: evaluate \(<lambda>\) raised StopIteration"
    with pytest.raises(EvaluationError, match=words):
        train(tiny_task(evaluate=lambda model, loader: next(scores)), tiny_net())


def test_another_runtime_error_is_told_with_its_place(tiny_task, tiny_net):
    with pytest.raises(TrainingError, match="raised RuntimeError at batch 1 of epoch 1: another"):
        train(tiny_task(), Small(tiny_net(), 0, RuntimeError("another")))


def test_training_data_that_raises_is_told_with_its_place(tiny_task, tiny_net):
    class Failing(list):
        def __iter__(self):
            yield from self[:2]
            raise OSError("image 7 cannot be read")

    task = tiny_task(train=Failing(tiny_task().train))
    with pytest.raises(TrainingError, match="raised OSError at batch 3 of epoch 1: image 7 cannot be read"):
        train(task, tiny_net())
