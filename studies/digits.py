"""Half the MACs of a small residual network on scikit-learn's handwritten digits.

Launch it with ``python studies/digits.py``, or with ``compress-search run configs/digits.yaml``. The network
is trained once, in seconds; its weights are kept and every study starts from them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from compress_search import FineTune, Task, create_study
from compress_search.checkpoint import load_weights, save_weights
from compress_search.fingerprint import seeded
from compress_search.progress import Progress
from compress_search.training.fine_tuning import fine_tune

SEED = 0
BATCH = 32


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, stride=stride)
        self.second = convolution(outputs, outputs)
        changes = stride > 1 or inputs != outputs
        self.shortcut = convolution(inputs, outputs, kernel=1, stride=stride) if changes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, inputs, height, width)`` to ``(batch, outputs, height / stride, width / stride)``."""
        residual = self.second(torch.relu(self.first(images)))
        return torch.relu(residual + self.shortcut(images))


def convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A padded convolution with batch normalisation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def residual_network(width: int = 16) -> nn.Sequential:
    """Eight convolutions, images ``(batch, 1, 8, 8)`` to logits ``(batch, 10)``."""
    return nn.Sequential(
        convolution(1, width),
        nn.ReLU(),
        Block(width, width),
        Block(width, 2 * width, stride=2),
        Block(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def split_digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """600 images to train, 600 to validate and 597 to test on, with each digit equally often in each.

    So few to train on, and so many to validate on, that a drop of accuracy can be seen.
    """
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    rest, test = train_test_split(range(len(labels)), test_size=597, stratify=labels, random_state=SEED)
    train, validation = train_test_split(rest, test_size=600, stratify=labels[rest], random_state=SEED)
    return (
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[validation], labels[validation]),
        TensorDataset(images[test], labels[test]),
    )


def batches(digits: TensorDataset, *, batch: int, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """A loader that takes each batch out of the tensors at once, not image by image."""
    sampler = RandomSampler(digits) if shuffle else SequentialSampler(digits)
    return DataLoader(digits, sampler=BatchSampler(sampler, batch, drop_last=False), batch_size=None)


BASELINE = Path(__file__).resolve().parents[1] / "runs" / "baselines" / "digits.safetensors"


def make_task(baseline: str | Path = BASELINE) -> Task:
    """Build the task around the trained network.

    Args:
        baseline: Where the trained weights are kept. If there is no such file, the network is trained.
    """
    # A network this small trains twice as fast on one thread as on two.
    torch.set_num_threads(1)
    train, validation, test = split_digits()
    with seeded(SEED):
        network = residual_network()
    task = Task(
        name="digits",
        model=network,
        example_input=torch.zeros(1, 1, 8, 8),
        train=batches(train, batch=BATCH, shuffle=True),
        validation=batches(validation, batch=600),
        test=batches(test, batch=597),
    )
    if not Path(baseline).exists():
        progress = Progress()
        progress.say(f"Training the digits network, once; its weights are kept in {baseline}.")
        schedule = FineTune(epochs=12, lr=0.1, distillation=0.0)
        trained = fine_tune(network, None, task, schedule, seed=SEED, progress=progress)
        save_weights(network, baseline)
        progress.say(f"The digits network has a validation accuracy of {trained.accuracy:.4f}.")
    load_weights(network, baseline)
    return task


def main() -> None:
    """Search for twelve trials, then show the front and the model to ship."""
    study = create_study("digits-script", make_task(), target=0.5)
    study.optimize(n_trials=12)
    print(study.front())

    best = study.best(max_drop=0.02)
    model = best.load_model()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"Trial {best.number} keeps {best.mac_ratio:.1%} of the MACs with {parameters} parameters.")
    print(f"The report lies at {study.report(best).page}.")


if __name__ == "__main__":
    main()
