"""What is asked of a tool, and what came of it, as JSON. Known to every environment: no import of a tool."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMPRESS_SEARCH, AIMET, TORCH_PRUNING = "compress_search", "aimet", "torch_pruning"
"""The tools."""


@dataclass(frozen=True)
class Step:
    """One compression.

    Attributes:
        method: ``spatial_svd`` or ``channel_pruning``.
        mac_ratio: MACs to keep / MACs of the model that the step gets.
    """

    method: str
    mac_ratio: float


@dataclass(frozen=True)
class Case:
    """One line of the table to be.

    Attributes:
        name: Unique; also the name of its folder.
        tool: Which tool compresses.
        network: Which network, a key of :data:`benchmarks.networks.PEER_NETWORKS`.
        steps: What it is to do.
        settings: What the tool is told beside that.
        rival: The case whose MACs the last step must not exceed, whatever its ``mac_ratio``; or ``None``.
        seed: Fixes what is random in the tool.
    """

    name: str
    tool: str
    network: str
    steps: tuple[Step, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    rival: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """What a tool's process is told. Two equal requests have one answer.

    Attributes:
        case: The case.
        weights_hash: SHA-256 of the file of the network's weights.
        threads: How many threads the process may use.
        budget: Most MACs that the compressed network may have; ``None`` without a rival.
        version: Of the tool. For compress_search a hash of its source, so that no result outlives the code.
    """

    case: Case
    weights_hash: str
    threads: int
    budget: int | None
    version: str

    def to_json(self) -> str:
        """The request as text."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read what :meth:`to_json` wrote."""
        value = json.loads(text)
        case = value.pop("case")
        steps = tuple(Step(**step) for step in case.pop("steps"))
        return cls(case=Case(**case, steps=steps), **value)


@dataclass(frozen=True)
class Effort:
    """What the compression cost, as the process itself saw it.

    Attributes:
        seconds: Wall time from the loaded network to the compressed one.
        cpu_seconds: Processor time of the same; it hardly minds what else the machine does.
        selection_seconds: The part of it in which the sizes were chosen; ``None`` where it is not known.
        evaluations: How often a candidate was scored; ``None`` where it is not known.
        image_forwards: MACs that convolutions and linear layers did in this time, in passes of one image
            through the original network.
        peak_gigabytes: The most memory that the process ever held, 10^9 bytes.
        version: Of the tool and of PyTorch.
    """

    seconds: float
    cpu_seconds: float
    selection_seconds: float | None
    evaluations: int | None
    image_forwards: float
    peak_gigabytes: float
    version: str


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
        case: Name of the case.
        accuracy: Share of the test images that are classified rightly; ``None`` after a fault.
        macs: Multiply-accumulates for one image; ``None`` after a fault.
        original_accuracy: The original network's accuracy.
        original_macs: The original network's MACs.
        effort: What it cost; ``None`` after a fault.
        error: The last line of the fault; ``None`` if there was none.
    """

    case: str
    accuracy: float | None
    macs: int | None
    original_accuracy: float
    original_macs: int
    effort: Effort | None
    error: str | None = None

    @property
    def mac_ratio(self) -> float | None:
        """MACs that are left / MACs of the original."""
        return None if self.macs is None else self.macs / self.original_macs

    @property
    def drop(self) -> float | None:
        """Accuracy lost, in percentage points."""
        return None if self.accuracy is None else 100 * (self.original_accuracy - self.accuracy)

    def to_json(self) -> str:
        """The result as text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Read what :meth:`to_json` wrote."""
        value = json.loads(text)
        effort = value.pop("effort")
        return cls(**value, effort=None if effort is None else Effort(**effort))


def asked_ratio(case: Case) -> float:
    """The MAC ratio that the steps ask for together, whatever the rival did."""
    ratio = 1.0
    for step in case.steps:
        ratio *= step.mac_ratio
    return ratio


def read_result(folder: Path, request: Request) -> Result | None:
    """The stored result of exactly this request, or ``None``."""
    asked, answer = folder / "request.json", folder / "result.json"
    if not answer.exists() or not asked.exists() or asked.read_text() != request.to_json():
        return None
    return Result.from_json(answer.read_text())
