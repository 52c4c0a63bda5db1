"""The store of finished stages: one folder each, named by the hash of everything that made it.

A folder appears whole or not at all. What is read back is checked against the checksums written with it; a
damaged folder is set aside under another name, reported, and computed again.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from compress_search.checkpoint import file_checksum, load_weights, save_weights
from compress_search.fingerprint import content_hash
from compress_search.plan import CompressionPlan, apply_plan
from compress_search.results import StageResult
from compress_search.workspace import Workspace, new_folder, remove_folder, write_json_atomically

logger = logging.getLogger("compress_search")

RESULT, PLAN, WEIGHTS = "result.json", "plan.json", "weights.safetensors"


@dataclass(frozen=True)
class StageStore:
    """The finished stages of a workspace.

    Attributes:
        workspace: Where they lie.
    """

    workspace: Workspace
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    def folder(self, key: str) -> Path:
        """The folder of the stage with this key, whether it exists or not."""
        return self.workspace.stages / key

    def find(self, key: str) -> StageResult | None:
        """Return the result of a finished stage, or ``None`` if there is none that is whole."""
        folder = self.folder(key)
        if not folder.is_dir():
            return None
        fault = None if key in self._verified else _fault_of(folder)
        if fault:
            aside = folder.with_name(f"{key}.damaged-{time.time_ns()}")
            folder.rename(aside)
            logger.warning(
                "The stored stage %s is damaged (%s). It was moved to %s and is computed again.",
                key,
                fault,
                aside,
            )
            return None
        self._verified.add(key)
        return StageResult.from_dict(json.loads((folder / RESULT).read_text(encoding="utf-8"))["result"])

    def save(self, result: StageResult, plan: CompressionPlan, model: nn.Module) -> None:
        """Store a finished stage under its key."""
        with new_folder(self.folder(result.key)) as folder:
            plan.save(folder / PLAN)
            save_weights(model, folder / WEIGHTS)
            stored: dict[str, Any] = {
                "result": result.to_dict(),
                "sha256": {name: file_checksum(folder / name) for name in (PLAN, WEIGHTS)},
            }
            write_json_atomically(folder / RESULT, stored | {"checksum": content_hash(stored)})

    def remove(self, key: str) -> None:
        """Forget a stage, if it is there."""
        self._verified.discard(key)
        remove_folder(self.folder(key))

    def model(self, key: str, original: nn.Module) -> nn.Module:
        """Build the model of a finished stage, in evaluation mode.

        Args:
            key: Of the stage.
            original: The model that its plan begins with. It is not changed.
        """
        model = apply_plan(original, self.plan(key))
        load_weights(model, self.weights(key))
        return model.eval()

    def plan(self, key: str) -> CompressionPlan:
        """Read the plan of a finished stage."""
        return CompressionPlan.load(self.folder(key) / PLAN)

    def weights(self, key: str) -> Path:
        """The weights of a finished stage, a safetensors file."""
        return self.folder(key) / WEIGHTS


def _fault_of(folder: Path) -> str | None:
    """What is wrong with a stage's files, if anything."""
    try:
        stored = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if stored.pop("checksum") != content_hash(stored):
            return f"{RESULT} does not have the checksum it was written with"
        for name, wanted in stored["sha256"].items():
            if file_checksum(folder / name) != wanted:
                return f"{name} does not have the checksum it was written with"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None
