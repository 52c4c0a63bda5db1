"""One training, step by step: everything that it is made of at any instant, so that it can go on there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress_search.exceptions import EvaluationError, TrainingError
from compress_search.fingerprint import content_hash, seeded
from compress_search.loaders import inputs_and_targets
from compress_search.memory_layout import can_train_channels_last
from compress_search.profile import inference_mode_of
from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.stopping import StopSwitch
from compress_search.task import Task
from compress_search.training.averaging import averaged_copy
from compress_search.training.batch_loss import BatchLoss
from compress_search.training.checkpoints import CheckpointFolder, Snapshot, copies
from compress_search.training.optimisers import make_optimiser
from compress_search.training.precision import casting, dtype_of, make_scaler
from compress_search.training.random_streams import RandomState, batches_of
from compress_search.training.schedules import learning_rate_factor
from compress_search.training.teacher_outputs import EpochOutputs, TeacherOutputs
from compress_search.training.trained import Trained

_Asking = Callable[[Sequence[Tensor]], list[Any]]
"""Gives the teacher's outputs of the parts of a batch."""

_LOWERED = 0.1
"""What the learning rate is multiplied by after a loss that is not finite."""

_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""In errors of a plainer type: of the CPU's allocator, and of what takes memory of a GPU past PyTorch's."""


class NotFiniteError(Exception):
    """A loss or a weight became infinite or NaN."""


class TrainingRun:
    """A training that is under way.

    Args:
        model: What is trained, in place.
        teacher: See :func:`compress_search.training.fine_tuning.fine_tune`, also for the others.
        task: Gives the training data and the loss.
        settings: How to train.
        seed: Fixes the random numbers of the model.
        data_seed: Fixes those of the data, also of what evaluations draw.
        teacher_outputs: Where the teacher's outputs lie; ``None`` to keep none.
        checkpoints: Where to leave checkpoints; ``None`` for nowhere.
        stop: Says when to stop.
        progress: Where to tell what happens.

    Attributes:
        epoch: How many epochs were trained and evaluated.
        learning_curve: What the evaluations said so far: before the first epoch, and after each.
        teacher_seconds_saved: Time that asking the teacher would have taken where its outputs were known.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        task: Task,
        settings: FineTune,
        *,
        seed: int,
        data_seed: int,
        teacher_outputs: TeacherOutputs | None,
        checkpoints: CheckpointFolder | None,
        stop: StopSwitch,
        progress: Progress,
    ) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self._parameters:
            raise TrainingError(
                f"No parameter of {type(model).__name__} requires a gradient, so nothing can be trained. "
                "Call model.requires_grad_() in the task, or set fine_tune.epochs to 0."
            )
        self._model, self._task, self._settings = model, task, settings
        self._seed, self._data_seed = seed, data_seed
        self._teacher = teacher if settings.distillation > 0 else None
        self._teacher_outputs = teacher_outputs
        self._checkpoints, self._stop, self._progress = checkpoints, stop, progress
        self._device = self._parameters[0].device
        self._layout = _lay_out(model, task.example_input.to(self._device), settings)
        self._dtype = dtype_of(settings.precision, self._device)
        self._scaler = make_scaler(self._dtype, self._device)
        self._optimiser = make_optimiser(self._parameters, settings)
        self._averaged = averaged_copy(model, settings.ema) if settings.ema else None
        run: Any = torch.compile(model) if settings.compile else model
        self._loss = BatchLoss(run, task, settings, self._device)
        self._batches_per_epoch = _count_batches(task.train)
        self._best_score, self._best = -math.inf, _copy_of_state(model)
        self.learning_curve: list[float] = []
        self.teacher_seconds_saved = 0.0
        # Of the epoch that is under way:
        self.epoch = 0
        self._batch = 0
        self._total = torch.zeros((), device=self._device)
        self._random: RandomState | None = None
        # What faults have made of the settings:
        self._rate = 1.0
        self._parts = 1
        self._safe: Snapshot | None = None

    def begin(self) -> None:
        """Go on from the checkpoint if there is one, and otherwise evaluate what was given."""
        latest, end_of_epoch = self._checkpoints.load() if self._checkpoints else (None, None)
        if end_of_epoch is None:
            self._evaluate(self._model, 0)
            end_of_epoch = self._snapshot()
        self._safe = end_of_epoch
        if latest is not None:
            self._restore(latest)
            self._progress.say(
                f"The fine-tuning goes on from its checkpoint: epoch {self.epoch + 1} of "
                f"{self._settings.epochs}, batch {self._batch + 1} of {self._batches_per_epoch}."
            )

    def run_epoch(self) -> str:
        """Train on every batch once, evaluate, and leave a checkpoint.

        Returns:
            How it went, in words.

        Raises:
            TrainingError: The loss was not finite for the second time, there is not enough memory for a
                single example, or the training data raised.
            EvaluationError: See :meth:`compress_search.task.Task.score`.
            KeyboardInterrupt: The process was asked to stop; the instant is kept in a checkpoint.
        """
        while True:
            try:
                loss = self._train_epoch()
                break
            except NotFiniteError as error:
                self._step_back(error)
        try:
            evaluated = self._model if self._averaged is None else self._averaged.module
            score = self._evaluate(evaluated, self.epoch + 1)
        except KeyboardInterrupt:
            # The batches of this epoch are all done.
            self._keep_instant()
            raise
        with self._stop.finishing():
            self.epoch, self._batch = self.epoch + 1, 0
            self._total = torch.zeros((), device=self._device)
            self._safe = self._snapshot()
            if self._checkpoints is not None:
                self._checkpoints.save_epoch(self._safe)
        if self._stop.requested:
            raise KeyboardInterrupt
        return f"accuracy {score:.4f}, loss {loss:.4f}"

    def finish(self) -> Trained:
        """Leave the model with the weights that are kept, in evaluation mode, and say how it went."""
        self._model.to(memory_format=torch.contiguous_format)
        self._model.load_state_dict(self._best)
        self._model.eval()
        return Trained(self._best_score, tuple(self.learning_curve), self.teacher_seconds_saved)

    def _evaluate(self, model: nn.Module, epoch: int) -> float:
        # One seed for all epochs, and for all trials, as the data's is: where a loader shuffles and drops the
        # rest, or draws a part of the data, the same examples judge all that are compared.
        with seeded(self._data_seed, self._task.validation):
            try:
                score = self._task.score(model.eval())
            except EvaluationError as error:
                when = f"after epoch {epoch}" if epoch else "before the first epoch"
                raise EvaluationError(f"In fine-tuning, {when}: {error}") from error
            least = self._best_score
            if epoch == self._settings.epochs:
                least -= self._task.standard_error(least)
        if score >= least:
            self._best_score, self._best = score, _copy_of_state(model)
        # An evaluation after which the process was stopped is made again.
        self.learning_curve[epoch:] = [score]
        return score

    def _train_epoch(self) -> float:
        self._model.train()
        if self._settings.freeze_batch_norm:
            _freeze_batch_norm(self._model)
        taught = self._taught()
        number = self.epoch + 1
        with seeded(_seed_of(self._data_seed, number), self._task.train), self._stop.finishing():
            batches = batches_of(self._task.train, skip=self._batch)
            with seeded(_seed_of(self._seed, number)):
                if self._random is not None:
                    self._random.restore()
                    self._random = None
                for batch in self._guarded(batches):
                    self._run_step_or_say_where(batch, taught)
                    self._batch += 1
                    self._look_up()
        mean = self._mean_loss()
        if taught is not None:
            taught.keep()
            self.teacher_seconds_saved += taught.seconds_saved
        if not _is_finite(self._model):
            raise NotFiniteError(f"weights are not finite after epoch {self.epoch + 1}")
        return mean

    def _taught(self) -> EpochOutputs | None:
        """What the teacher says in this epoch; ``None`` if there is none."""
        if self._teacher is None:
            return None
        kept, file, largest = self._teacher_outputs, None, 0
        if kept is not None:
            setting = (str(self._dtype), str(self._layout), self._device.type)
            file, largest = kept.epoch(self.epoch + 1, setting), kept.largest // self._settings.epochs
        return EpochOutputs(
            partial(_outputs_of, self._teacher), file, batches=self._batches_per_epoch, largest=largest
        )

    def _guarded(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches; say where it was if the training data raises."""
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                if self._stop.requested:
                    # Worker processes of a loader get Ctrl-C too, and their end is an error of the loader.
                    self._keep_instant()
                    raise KeyboardInterrupt from error
                raise TrainingError(
                    f"The training data raised {type(error).__name__} at batch {self._batch + 1} of epoch "
                    f"{self.epoch + 1}: {error}"
                ) from error
            if batch is None:
                return
            yield batch

    def _look_up(self) -> None:
        """After a step: stop if that is wanted, and leave a checkpoint if one is due."""
        if self._stop.requested:
            self._keep_instant()
            raise KeyboardInterrupt
        if self._checkpoints is not None and self._checkpoints.is_due:
            self._mean_loss()
            self._keep_instant()

    def _mean_loss(self) -> float:
        """The mean loss of the epoch so far. Read at every step, it would make a GPU wait for each."""
        mean = self._total.item() / max(self._batch, 1)
        if not math.isfinite(mean):
            raise NotFiniteError(f"the loss of epoch {self.epoch + 1} is {mean}")
        return mean

    def _keep_instant(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save_step(self._snapshot())

    def _step_back(self, error: NotFiniteError) -> None:
        """Return to the end of the last epoch with a lower learning rate, once."""
        rate = self._settings.lr * self._rate
        if self._rate < 1:
            raise TrainingError(
                f"In fine-tuning, {error}, with a learning rate of {rate:g} after it was lowered once. "
                f"Lower fine_tune.lr (it is {self._settings.lr:g}) or fine_tune.gradient_clip "
                f"(it is {self._settings.gradient_clip})."
            ) from error
        assert self._safe is not None
        self._restore(self._safe)
        self._rate = _LOWERED
        self._progress.say(
            f"In fine-tuning, {error}. It goes back to the end of epoch {self.epoch} and on with a "
            f"learning rate of {rate * _LOWERED:g} in place of {rate:g}."
        )

    def _run_step_or_say_where(self, batch: Any, taught: EpochOutputs | None) -> None:
        try:
            self._run_step(batch, taught)
        except (NotFiniteError, TrainingError):
            raise
        except Exception as error:
            raise TrainingError(
                f"Fine-tuning raised {type(error).__name__} at batch {self._batch + 1} of epoch "
                f"{self.epoch + 1}: {error}"
            ) from error

    def _run_step(self, batch: Any, taught: EpochOutputs | None) -> None:
        given, targets = inputs_and_targets(batch)
        inputs = given.to(self._device)
        if inputs.ndim == 4:
            inputs = inputs.to(memory_format=self._layout)
        targets = None if targets is None else targets.to(self._device)
        steps = self._settings.epochs * self._batches_per_epoch
        step = min(self.epoch * self._batches_per_epoch + self._batch, steps - 1)
        for group in self._optimiser.param_groups:
            group["lr"] = self._settings.lr * self._rate * learning_rate_factor(step, steps, self._settings)
        ask = None if taught is None else partial(taught.of, self._batch, given)
        self._total += self._backward_within_memory(inputs, targets, ask)
        if self._settings.gradient_clip is not None:
            self._scaler.unscale_(self._optimiser)
            nn.utils.clip_grad_norm_(self._parameters, self._settings.gradient_clip)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self._averaged is not None:
            self._averaged.update_parameters(self._model)

    def _backward_within_memory(self, inputs: Tensor, targets: Tensor | None, ask: _Asking | None) -> Tensor:
        """Make the gradients of a batch, in more and smaller parts each time that memory does not suffice."""
        while True:
            try:
                return self._backward(inputs, targets, ask)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if self._parts >= len(inputs):
                    raise TrainingError(
                        f"There is not enough memory to train {type(self._model).__name__} on a single "
                        f"example of shape {tuple(inputs.shape[1:])} on {self._device} "
                        f"({_first_line(error)})."
                    ) from error
            # Out of the except block: what the traceback holds of the failed pass is free by now.
            self._optimiser.zero_grad(set_to_none=True)
            self._parts *= 2
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._progress.say(
                f"There was not enough memory for a batch of {len(inputs)}: from here on, its gradients are "
                f"added up over {self._parts} parts."
            )

    def _backward(self, inputs: Tensor, targets: Tensor | None, ask: _Asking | None) -> Tensor:
        self._optimiser.zero_grad()
        total = torch.zeros((), device=self._device)
        size = math.ceil(len(inputs) / self._parts)
        parts = torch.split(inputs, size)
        labels: Iterable[Tensor | None] = [None] * len(parts)
        if targets is not None:
            labels = torch.split(targets, size)
        taught: Sequence[Any] = [None] * len(parts)
        if ask is not None:
            with casting(self._dtype, self._device):
                taught = ask(parts)
        for part, wanted, said in zip(parts, labels, taught, strict=True):
            with casting(self._dtype, self._device):
                loss = self._loss(part, wanted, said) * (len(part) / len(inputs))
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _snapshot(self) -> Snapshot:
        random = RandomState.now()
        tensors = copies(self._model.state_dict(), prefix="model") | copies(self._best, prefix="best")
        if self._averaged is not None:
            tensors |= copies(self._averaged.state_dict(), prefix="averaged")
        states = self._optimiser.state_dict()["state"]
        entries = {f"{number}/{name}": value for number in states for name, value in states[number].items()}
        tensors |= copies({n: v for n, v in entries.items() if isinstance(v, Tensor)}, prefix="optimiser")
        random_tensors = {"cpu": random.cpu, "numpy": torch.from_numpy(random.numpy[1].astype(np.int64))}
        if self._device.index in random.gpus:
            # Of the others nothing is drawn, and the process that goes on may see fewer or other ones.
            random_tensors["gpu"] = random.gpus[self._device.index]
        tensors |= copies({"total": self._total, **random_tensors}, prefix="now")
        return Snapshot(
            tensors,
            {
                "step": self.epoch * self._batches_per_epoch + self._batch,
                "epoch": self.epoch,
                "batch": self._batch,
                "best_score": self._best_score,
                "learning_curve": list(self.learning_curve),
                "teacher_seconds_saved": self.teacher_seconds_saved,
                "rate": self._rate,
                "parts": self._parts,
                "scaler": self._scaler.state_dict(),
                "numpy": [random.numpy[0], *random.numpy[2:]],
                "python": [random.python[0], list(random.python[1]), random.python[2]],
            },
        )

    def _restore(self, snapshot: Snapshot) -> None:
        values, now = snapshot.values, snapshot.part("now")
        self._model.load_state_dict(snapshot.part("model"))
        self._best = {name: tensor.to(self._device) for name, tensor in snapshot.part("best").items()}
        if self._averaged is not None:
            self._averaged.load_state_dict(snapshot.part("averaged"))
        self._restore_optimiser(snapshot.part("optimiser"))
        self._scaler.load_state_dict(values["scaler"])
        self.epoch, self._batch = values["epoch"], values["batch"]
        self._best_score, self._rate, self._parts = values["best_score"], values["rate"], values["parts"]
        # Checkpoints of before there were learning curves know the best of their epochs alone.
        curve = [self._best_score] * (self.epoch + 1)
        self.learning_curve = list(values.get("learning_curve", curve))
        self.teacher_seconds_saved = values.get("teacher_seconds_saved", 0.0)
        # A copy, as all that is changed in place: the snapshot may be needed again.
        self._total = now["total"].to(self._device, copy=True)
        kind, position, has_gauss, gauss = values["numpy"]
        version, words, python_gauss = values["python"]
        self._random = RandomState(
            now["cpu"],
            {self._device.index: now["gpu"]} if "gpu" in now and self._device.index is not None else {},
            (kind, now["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss),
            (version, tuple(words), python_gauss),
        )
        if self._batch == 0:
            # The next epoch begins with random numbers of its own.
            self._random = None

    def _restore_optimiser(self, entries: dict[str, Tensor]) -> None:
        parameters = [parameter for group in self._optimiser.param_groups for parameter in group["params"]]
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in entries.items():
            number, entry = name.split("/")
            parameter = parameters[int(number)]
            # In the parameter's layout, as they were: other loops round other bits.
            own = torch.empty_like(
                parameter if tensor.shape == parameter.shape else tensor, dtype=tensor.dtype
            )
            states.setdefault(int(number), {})[entry] = own.copy_(tensor)
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": states, "param_groups": groups})


def _lay_out(model: nn.Module, example: Tensor, settings: FineTune) -> torch.memory_format:
    """Bring the parameters into one layout, whatever they came in: other layouts round other bits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    if settings.channels_last and can_train_channels_last(model, example):
        model.to(memory_format=torch.channels_last)
        return torch.channels_last
    return torch.contiguous_format


def _outputs_of(teacher: nn.Module, inputs: Tensor) -> Any:
    with inference_mode_of(teacher):
        return teacher(inputs)


def _seed_of(seed: int, epoch: int) -> int:
    return int(content_hash([seed, epoch])[:8], 16)


def _count_batches(loader: Iterable[Any]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        with seeded(0, loader):
            return sum(1 for _ in loader)


def _copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _freeze_batch_norm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _is_finite(model: nn.Module) -> bool:
    """Whether all weights and statistics are; read from the device at once.

    Other buffers are not asked: a mask of attention is infinite from the beginning.
    """
    statistics = (
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer in module.buffers(recurse=False)
    )
    learnt = itertools.chain(model.parameters(), statistics)
    finite = [tensor.isfinite().all() for tensor in learnt if tensor.is_floating_point()]
    return bool(torch.stack(finite).all()) if finite else True


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _OF_MEMORY)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
