"""Fine-tuning: train a compressed model on, taught by the original, and keep its best epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.stopping import StopSwitch
from compress_search.task import Task
from compress_search.training.checkpoints import CheckpointFolder
from compress_search.training.teacher_outputs import TeacherOutputs
from compress_search.training.trained import Trained
from compress_search.training.training_run import TrainingRun


def fine_tune(
    model: nn.Module,
    teacher: nn.Module | None,
    task: Task,
    settings: FineTune,
    *,
    seed: int,
    data_seed: int | None = None,
    teacher_outputs: TeacherOutputs | None = None,
    progress: Progress,
    checkpoints: CheckpointFolder | None = None,
    stop: StopSwitch | None = None,
    after_epoch: Callable[[Sequence[float]], None] | None = None,
) -> Trained:
    """Train a model in place, on the device where it lies, and leave it with the weights of its best epoch.

    The model is evaluated before the first epoch and after each one. The weights and batch normalisation
    statistics of the best evaluation are kept, those it came with included. Of equal evaluations the last one
    stays, and the last of all also where it is less than a standard error below the best: it was trained the
    longest, at the lowest learning rate, and what the other had on top may be the luck of its validation
    images (the one standard error rule: Breiman, Friedman, Olshen and Stone 1984, *Classification and
    regression trees*, section 3.4.3). See :meth:`compress_search.task.Task.standard_error`.

    Every epoch draws its random numbers from seeds of its own, and the data from a stream of its own. The
    same call therefore gives the same bits on a CPU, and on a GPU with deterministic algorithms; so does a
    call that was killed and goes on from its checkpoints, in a process of as many threads.

    A loss that is not finite takes the training back to the end of the epoch before, and on from there at a
    tenth of the learning rate, once. Where memory does not suffice for a batch, its gradients are added up
    over smaller and smaller parts of it, whose means have to be the mean of the whole: batch normalisation
    then sees smaller batches.

    Args:
        model: The model to train. It is left in evaluation mode.
        teacher: The original model, on the same device, for distillation; ``None`` for none. It is not
            changed.
        task: Gives the training data, the loss and the evaluation.
        settings: How to train; with 0 epochs the model is only evaluated.
        seed: Fixes dropout and whatever else the model draws.
        data_seed: Fixes the order of the data and its augmentation, and what evaluations draw; by default
            ``seed``.
        teacher_outputs: Where what the teacher says of these data is read, and kept for others; ``None`` to
            ask the teacher each time.
        progress: Where to show the epochs.
        checkpoints: Where to leave checkpoints, and to go on from. They are of this very call: whoever names
            the folder sees to that, and removes it when the outcome is stored.
        stop: Says when to stop.
        after_epoch: Called after each epoch, and where the training goes on from a checkpoint, with what the
            evaluations said so far: before the first epoch, and after each. What it raises ends the training.

    Returns:
        What ``task.score(model)`` says of the weights that were kept, and how it came to that.

    Raises:
        TrainingError: The loss is not finite even at a lower learning rate, or cannot take what the model
            returns in training; no parameter can be trained; the output cannot be distilled; the training
            data raised; there is not enough memory for a single example.
        EvaluationError: See :meth:`compress_search.task.Task.score`.
        KeyboardInterrupt: ``stop`` was requested: the instant is kept in a checkpoint.
    """
    if settings.epochs == 0:
        accuracy = task.score(model.eval())
        return Trained(accuracy, (accuracy,))
    run = TrainingRun(
        model,
        teacher,
        task,
        settings,
        seed=seed,
        data_seed=seed if data_seed is None else data_seed,
        teacher_outputs=teacher_outputs,
        checkpoints=checkpoints,
        stop=stop or StopSwitch(),
        progress=progress,
    )
    run.begin()
    with progress.bar("epochs", settings.epochs, done=run.epoch) as advance:
        while True:
            if run.epoch and after_epoch is not None:
                after_epoch(run.learning_curve[: run.epoch + 1])
            if run.epoch == settings.epochs:
                return run.finish()
            advance(run.run_epoch())
