"""The digits study, fine-tuned by Lightning in place of the package: how to bring a training of your own.

Launch it with ``python studies/lightning_training.py``; it needs ``pip install lightning``.

The whole contract is ``training(model, job)``, given as ``Task(training=...)``. It changes the weights of
``model``, which it is given in training mode, in place, and nothing else; what it returns is not looked at.
``job`` says what to do:

=====================  ===================================================================================
``job.settings``       ``epochs``, ``lr`` and the others of ``fine_tune``, as the search chose them;
                       ``job.settings.options`` is whatever you wrote as ``fine_tune: {options: {...}}``
``job.task``           your task: ``job.task.train``, ``.validation``, ``.loss``, ``job.task.score(model)``
``job.original``       the uncompressed model on the same device, to learn from
``job.seed``           every random source is seeded with it already
``job.device``         where the model is, and has to be in the end
``job.folder``         keep checkpoints here: a killed job finds them again; removed when the stage is stored
``job.progress``       ``job.progress.bar("epochs", n)`` for a bar and the log
``job.stop_requested`` true after Ctrl-C: leave a checkpoint, and raise ``KeyboardInterrupt``
``job.epoch_done``     ``epoch_done(epoch, accuracy)``, from epoch 1 on, if you want learning curves. It
                       raises an exception, for you to let pass, where ``median_stopping`` gives up a trial
=====================  ===================================================================================

Stages are still stored and shared; the model is evaluated before and after, and a worse one is not kept. The
function is known by its name: rename it, or change an option, when it would give other weights than before.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings

import lightning
import torch
from digits import make_task
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional

from compress_search import FineTune, Task, TrainingJob, create_study


class Student(lightning.LightningModule):
    """A compressed model that learns from labels and from the original model."""

    def __init__(self, model: nn.Module, job: TrainingJob) -> None:
        super().__init__()
        self.model, self._job = model, job

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of one batch ``(images, labels)``."""
        images, labels = batch
        logits = self.model(images)
        with torch.no_grad():
            taught = self._job.original(images)
        own = self._job.task.loss(logits, labels)
        return own + functional.mse_loss(logits, taught)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimiser; the search chose its learning rate."""
        return torch.optim.AdamW(self.parameters(), lr=self._job.settings.lr)


class TellEpochs(Callback):
    """Tells the study how good the model is after each epoch."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job

    def on_train_epoch_end(self, trainer: lightning.Trainer, student: lightning.LightningModule) -> None:
        """Look at the validation data, and tell."""
        assert isinstance(student, Student)
        self._job.epoch_done(trainer.current_epoch + 1, self._job.task.score(student.model.eval()))
        student.model.train()


class StopOnRequest(Callback):
    """Passes Ctrl-C on, once the step is done and a checkpoint is there."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Look whether to stop."""
        if self._job.stop_requested():
            trainer.save_checkpoint(self._job.folder / "last.ckpt")
            trainer.should_stop = True


def train_with_lightning(model: nn.Module, job: TrainingJob) -> None:
    """Fine-tune a model in place, or go on where the same job was killed."""
    # The bars and the log are those of the study.
    trainer = lightning.Trainer(
        max_epochs=job.settings.epochs,
        default_root_dir=job.folder,
        accelerator="gpu" if job.device.type == "cuda" else "cpu",
        devices=[job.device.index or 0] if job.device.type == "cuda" else 1,
        callbacks=[TellEpochs(job), ModelCheckpoint(job.folder, save_last=True), StopOnRequest(job)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = job.folder / "last.ckpt"
    trainer.fit(Student(model, job), job.task.train, ckpt_path=last if last.exists() else None)
    # Lightning leaves a model on the CPU, wherever it was trained.
    model.to(job.device)
    if job.stop_requested():
        # Raised within fit, it would make Lightning end the process.
        raise KeyboardInterrupt


def lightning_task() -> Task:
    """The digits task, trained by Lightning."""
    return dataclasses.replace(make_task(), name="digits-lightning", training=train_with_lightning)


def main() -> None:
    """Search for five trials, and show the front."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    study = create_study(
        "digits-lightning", lightning_task(), target=0.5, fine_tune=FineTune(epochs=4, lr=2e-3)
    )
    study.optimize(n_trials=5)
    print(study.front())


if __name__ == "__main__":
    main()
