"""The fine-tunings of a workspace: by the package or by the user's function, with checkpoints by key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.stopping import StopSwitch
from compress_search.task import Task
from compress_search.training.checkpoints import CheckpointFolder
from compress_search.training.fine_tuning import fine_tune
from compress_search.training.own_function import train_by
from compress_search.training.teacher_outputs import TeacherOutputs
from compress_search.training.trained import Trained
from compress_search.workspace import Workspace, remove_folder

CHECKPOINT_SECONDS = 60.0
"""How often a fine-tuning leaves a checkpoint, beside those after each epoch."""


@dataclass(frozen=True)
class Trainer:
    """Trains models of one task.

    Attributes:
        task: Gives the data, the loss and the evaluation, or a training function of its own.
        workspace: Where checkpoints lie.
        progress: Where to show the epochs.
        checkpoint_seconds: How often there is a checkpoint.
        stop: Says when to stop.
    """

    task: Task
    workspace: Workspace
    progress: Progress
    checkpoint_seconds: float
    stop: StopSwitch

    def train(
        self,
        model: nn.Module,
        original: nn.Module,
        settings: FineTune,
        key: str,
        lesson: str,
        *,
        after_epoch: Callable[[Sequence[float]], None] | None = None,
    ) -> Trained:
        """Train a model in place, or go on where a process that trained the same was killed.

        Args:
            model: The model. It is left in evaluation mode.
            original: The uncompressed model, which teaches.
            settings: How to train.
            key: The hash of everything that makes the outcome; it is the seed of what the model draws, and
                names the checkpoints.
            lesson: The hash of the original, the training data, and what tells this pass through them from
                others; it is the seed of the data, and names what the original says of them.
            after_epoch: See :func:`compress_search.training.fine_tuning.fine_tune`; with a training function
                of the task's own it is called when that tells of an epoch.

        Returns:
            What ``task.score(model)`` says of the weights that were kept, and how it came to that.

        Raises:
            TrainingError: See :func:`compress_search.training.fine_tuning.fine_tune`.
            KeyboardInterrupt: ``stop`` was requested.
        """
        folder, seed = self.workspace.checkpoints / key, int(key[:8], 16)
        if self.task.training is not None:
            return train_by(
                model,
                original,
                self.task,
                settings,
                seed=seed,
                progress=self.progress,
                folder=folder,
                stop=self.stop,
                after_epoch=after_epoch,
            )
        return fine_tune(
            model,
            original,
            self.task,
            settings,
            seed=seed,
            data_seed=int(lesson[:8], 16),
            teacher_outputs=TeacherOutputs(self.workspace.teacher, lesson),
            progress=self.progress,
            checkpoints=CheckpointFolder(folder, self.checkpoint_seconds),
            stop=self.stop,
            after_epoch=after_epoch,
        )

    def forget(self, key: str) -> None:
        """Remove the checkpoints of a training whose outcome is stored."""
        remove_folder(self.workspace.checkpoints / key)

    def stop_if_requested(self) -> None:
        """End the process's work if it was asked to stop; for when the outcome of a training is stored.

        Raises:
            KeyboardInterrupt: ``stop`` was requested.
        """
        if self.stop.requested:
            raise KeyboardInterrupt
