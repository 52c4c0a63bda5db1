"""One fine-tuning of one compressed network: what is asked, what came of it, and where that is kept."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from compress_search import FineTune
from compress_search.fingerprint import content_hash
from compress_search.workspace import write_json_atomically


@dataclass(frozen=True)
class Tuning:
    """What is asked. Two that are equal have one answer.

    Attributes:
        case: Name of the case of :mod:`benchmarks.ratio_selection` that compressed the network.
        model_hash: SHA-256 of the file of the compressed network's weights.
        weights_hash: SHA-256 of the file of the original network's weights.
        settings: How to train.
        images: Number of training images.
        threads: How many threads may be used.
        seed: Fixes the order of the images and their augmentation.
        version: Hash of the source that trains.
    """

    case: str
    model_hash: str
    weights_hash: str
    settings: FineTune
    images: int
    threads: int
    seed: int
    version: str

    @property
    def distilled(self) -> bool:
        """Whether the original network teaches."""
        return self.settings.distillation > 0

    def file(self, folder: Path) -> Path:
        """Where the answer is kept."""
        return folder / self.case / f"{content_hash(dataclasses.asdict(self))[:16]}.json"


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Attributes:
        mac_ratio: MACs of the compressed network / MACs of the original.
        original: Accuracy of the original network on the test images, as are the next two.
        before: Accuracy of the compressed network before fine-tuning.
        after: Its accuracy after fine-tuning.
        validation: Accuracy of the epoch that was kept, on the validation images that chose it.
        seconds: Wall time of the fine-tuning, with its evaluations on the validation images.
        cpu_seconds: Processor time of the same; it hardly minds what else the machine does.
    """

    mac_ratio: float
    original: float
    before: float
    after: float
    validation: float
    seconds: float
    cpu_seconds: float

    @property
    def drop(self) -> float:
        """Accuracy lost to compression after fine-tuning, in percentage points."""
        return 100 * (self.original - self.after)


def stored(tuning: Tuning, folder: Path) -> Tuned | None:
    """What came of exactly this fine-tuning, or ``None`` if it was not run."""
    file = tuning.file(folder)
    return Tuned(**json.loads(file.read_text())["tuned"]) if file.exists() else None


def keep(tuning: Tuning, tuned: Tuned, folder: Path) -> None:
    """Store what came of a fine-tuning, whole or not at all."""
    values = {"tuning": dataclasses.asdict(tuning), "tuned": dataclasses.asdict(tuned)}
    write_json_atomically(tuning.file(folder), values)
