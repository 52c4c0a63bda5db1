"""Train the networks that the CIFAR-10 studies compress: ResNet-20, ResNet-56 and VGG-16.

Launch it with ``python studies/train_baseline.py resnet56``. It is the package's own fine-tuning, by the
labels alone and from random weights. After Ctrl-C, ``kill -9`` or a power cut the same command goes on from
the last checkpoint. The weights come as safetensors, with a JSON file beside them that says what made them:
the command, the seed, the epochs, the accuracies and the file's SHA-256.

The last thousand training images are held out to pick the best epoch. The test images are looked at once, for
the network that was picked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cifar10_networks import EXAMPLE, NETWORKS
from image_data.cifar10 import load_cifar10
from image_data.images import FOLDER, Images
from image_data.in_memory import AugmentedBatches, whole_batches
from torch import nn

from compress_search import FineTune, Task
from compress_search.checkpoint import file_checksum, load_weights, save_weights
from compress_search.cli.configs import shipped_root
from compress_search.exceptions import CompressSearchError
from compress_search.fingerprint import content_hash, seeded
from compress_search.profile import profile_model
from compress_search.progress import Progress
from compress_search.recipe import stage_to_dict
from compress_search.stopping import StopSwitch
from compress_search.training.checkpoints import CheckpointFolder
from compress_search.training.fine_tuning import fine_tune
from compress_search.workspace import write_text_atomically

VALIDATION_IMAGES = 1_000
SEED = 0
BASELINES = Path("runs/baselines")
SHIPPED = shipped_root() / "studies" / "weights"

PUBLISHED: Mapping[str, float] = {"resnet20": 0.923, "resnet56": 0.935, "vgg16": 0.939}
"""Accuracies on the test images that are the bar for ``--preset full``."""


@dataclass(frozen=True)
class Preset:
    """How long and on what to train.

    Attributes:
        epochs: For each network.
        images: How many training images; ``None`` is all.
        lr: Highest learning rate, for batches of 128.
        crop: Height and width of the parts of images to train on, in pixels.
        padding: Black pixels around each image.
        cutout: Side of the square that is cut out of each part, in pixels.
        label_smoothing: See :class:`compress_search.FineTune`.
    """

    epochs: Mapping[str, int]
    images: int | None
    lr: float
    crop: int
    padding: int
    cutout: int
    label_smoothing: float


PRESETS: Mapping[str, Preset] = {
    "smoke": Preset(
        epochs=dict.fromkeys(NETWORKS, 1),
        images=2_560,
        lr=0.1,
        crop=16,
        padding=0,
        cutout=0,
        label_smoothing=0.0,
    ),
    "hour": Preset(
        epochs={"resnet20": 50, "resnet56": 20, "vgg": 20, "vgg16": 12},
        images=None,
        lr=0.3,
        crop=24,
        padding=0,
        cutout=0,
        label_smoothing=0.0,
    ),
    "full": Preset(
        epochs=dict.fromkeys(NETWORKS, 200),
        images=None,
        lr=0.1,
        crop=32,
        padding=4,
        cutout=0,
        label_smoothing=0.0,
    ),
}
"""A minute of one CPU thread; about an hour of it; what a published accuracy takes, for a GPU."""


@dataclass(frozen=True)
class Plan:
    """One training, whole: equal plans make the same weights (in processes of as many threads, on a CPU).

    Attributes:
        network: A key of :data:`cifar10_networks.NETWORKS`.
        preset: A key of :data:`PRESETS`.
        epochs: Passes over the training images.
        seed: Fixes the first weights, the order of the images and their augmentation.
        threads: Of the CPU.
        device: Where to train.
    """

    network: str
    preset: str = "hour"
    epochs: int | None = None
    seed: int = SEED
    threads: int = 1
    device: str = "cpu"

    @property
    def schedule(self) -> FineTune:
        """How the network is trained."""
        preset = PRESETS[self.preset]
        # Twice as fast on processors that multiply in bfloat16, and many times slower on those that do not.
        quick = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
        on_cpu = "bfloat16" if quick else "float32"
        return FineTune(
            epochs=self.epochs or preset.epochs[self.network],
            lr=preset.lr,
            schedule="one_cycle",
            warmup=0.25,
            distillation=0.0,
            label_smoothing=preset.label_smoothing,
            precision=on_cpu if self.device == "cpu" else "auto",
        )

    @property
    def command(self) -> str:
        """What launches it."""
        return (
            f"python studies/train_baseline.py {self.network} --preset {self.preset} "
            f"--epochs {self.schedule.epochs} --seed {self.seed} --threads {self.threads} "
            f"--device {self.device}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything that makes the weights, JSON-able."""
        preset = dataclasses.asdict(PRESETS[self.preset])
        data = {name: preset[name] for name in ("images", "crop", "padding", "cutout")}
        return {
            "network": self.network,
            "command": self.command,
            "seed": self.seed,
            "data": data,
            "training": stage_to_dict(self.schedule),
        }


def held_out(train: Images) -> tuple[Images, Images]:
    """Split training images into those to train on and the last thousand, to validate on."""
    return train.part(-VALIDATION_IMAGES), train.part(-VALIDATION_IMAGES, None)


def weights_of(name: str, *, folder: Path = BASELINES) -> Path:
    """The file of a network's weights: the shipped one, or else where :func:`trained` keeps them."""
    file = f"cifar10-{name}.safetensors"
    return SHIPPED / file if (SHIPPED / file).exists() else folder / file


def trained(name: str, train: Images, *, folder: Path = BASELINES) -> nn.Sequential:
    """Return a trained network, in evaluation mode.

    It is trained if its weights are neither shipped nor in the folder.
    """
    weights = weights_of(name, folder=folder)
    if not weights.exists():
        train_baseline(Plan(name, threads=torch.get_num_threads()), train, weights)
    network = NETWORKS[name]()
    load_weights(network, weights)
    return network.eval()


def train_baseline(plan: Plan, train: Images, weights: Path) -> float:
    """Train a network, or go on where the same plan was interrupted, and write its weights.

    Returns:
        Its accuracy on the held-out training images, in [0, 1].

    Raises:
        KeyboardInterrupt: After Ctrl-C, when there is a checkpoint.
    """
    preset = PRESETS[plan.preset]
    with seeded(plan.seed):
        network = NETWORKS[plan.network]().to(plan.device)
    seen, unseen = held_out(train)
    task = Task(
        name=plan.network,
        model=network,
        example_input=EXAMPLE,
        train=AugmentedBatches(
            seen.part(preset.images),
            crop=preset.crop,
            padding=preset.padding,
            cutout=preset.cutout,
            device=plan.device,
        ),
        validation=whole_batches(unseen, device=plan.device),
    )
    key, stop = content_hash(plan.to_dict()), StopSwitch()
    checkpoints = CheckpointFolder(weights.with_suffix(".checkpoints") / key)
    with stop.on_signals():
        outcome = fine_tune(
            network,
            None,
            task,
            plan.schedule,
            seed=plan.seed,
            progress=Progress(),
            checkpoints=checkpoints,
            stop=stop,
        )
    save_weights(network, weights)
    checkpoints.remove()
    return outcome.accuracy


def describe(plan: Plan, weights: Path, test: Images, *, validation: float) -> dict[str, Any]:
    """What made a file of weights and what they are worth, JSON-able; the test images are looked at."""
    network = NETWORKS[plan.network]()
    load_weights(network, weights)
    profile = profile_model(network.eval(), EXAMPLE)
    batches = whole_batches(test, device=plan.device)
    task = Task(model=network, example_input=EXAMPLE, train=batches, validation=batches)
    return plan.to_dict() | {
        "validation_accuracy": validation,
        "test_accuracy": task.score(network.to(plan.device)),
        "macs": profile.macs,
        "parameters": profile.params,
        "sha256": file_checksum(weights),
        "torch": torch.__version__,
    }


def check_free(plan: Plan, weights: Path) -> bool:
    """Whether the weights are still to be trained.

    Raises:
        CompressSearchError: There are weights that another plan made.
    """
    if not weights.exists():
        return True
    about = weights.with_suffix(".json")
    made = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    # As JSON has it, which knows no tuples.
    if json.loads(json.dumps(plan.to_dict())).items() <= made.items():
        return False
    raise CompressSearchError(
        f"{weights} was made otherwise ({made.get('command', 'it is not known how')}) and is not replaced. "
        "Move it away, or name another folder by --output."
    )


def parsed() -> argparse.Namespace:
    """Read the command line."""
    bars = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in PUBLISHED.items())
    hours = ", ".join(f"{name} {epochs}" for name, epochs in PRESETS["hour"].epochs.items())
    parser = argparse.ArgumentParser(
        description="Train a network on CIFAR-10; interrupted, the same command goes on.",
        epilog=f"Published accuracies, the bar for --preset full on a GPU: {bars}. "
        "What an hour on a CPU reaches is less, and the JSON file says so beside the weights.",
    )
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="hour",
        help=f"smoke: 1 epoch; hour (default): about an hour of a CPU thread, in epochs {hours}; "
        "full: 200 epochs, for a GPU",
    )
    parser.add_argument("--epochs", type=int, help="in place of the preset's")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, default=FOLDER, help=f"where CIFAR-10 lies (default {FOLDER})")
    parser.add_argument("--output", type=Path, default=BASELINES, help=f"folder (default {BASELINES})")
    given = parser.parse_args()
    for name in ("epochs", "threads"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be 1 or more.")
    return given


def main() -> None:
    """Train what is not trained yet, evaluate it, and write the weights and what made them."""
    given = parsed()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    plan = Plan(given.network, given.preset, given.epochs, given.seed, given.threads, given.device)
    weights = given.output / f"cifar10-{plan.network}.safetensors"
    about = weights.with_suffix(".json")
    if check_free(plan, weights):
        start = time.perf_counter()
        torch.set_num_threads(plan.threads)
        train, test = load_cifar10(given.data)
        validation = train_baseline(plan, train, weights)
        print(f"Trained in {time.perf_counter() - start:.0f} s, as far as this process did it.")
        write_text_atomically(
            about, json.dumps(describe(plan, weights, test, validation=validation), indent=2)
        )
    print(about.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
