"""The files that the dashboard offers: of each trial its plan and its model, of the study its pictures.

They are listed and read where they lie, or made when they are asked for; nothing is copied, and nothing can
be written. Web pages are never among them: the dashboard would show what is in them unescaped.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from bottle import HTTPResponse
from optuna.trial import FrozenTrial

from compress_search.exceptions import CompressSearchError
from compress_search.plan import CompressionPlan
from compress_search.reports.pareto import pareto_data
from compress_search.reports.pareto_picture import draw_static
from compress_search.results import ParetoFront
from compress_search.search.history import STAGES
from compress_search.search.layer_tables import LayerTables, layers_csv
from compress_search.stage_files import PLAN, WEIGHTS, fault_of

ARTIFACTS = "artifacts:"
"""Where in the system attributes of a trial or study the dashboard looks for files."""

_KEY = re.compile(r"[0-9a-f]{20}")
"""What a stage's folder is called. A database may hold anything, and a path is made of it."""


@dataclass(frozen=True)
class _Kind:
    """One kind of file: the end of its identifier, its name, its media type."""

    suffix: str
    filename: str
    mimetype: str

    def listed(self, owner: str) -> dict[str, str]:
        identifier = f"{owner}-{self.suffix}"
        meta = {"artifact_id": identifier, "filename": self.filename, "mimetype": self.mimetype}
        return {ARTIFACTS + identifier: json.dumps(meta | {"encoding": None})}


# The dashboard allows hexadecimal digits and dashes in an identifier.
_LAYERS = _Kind("a1", "layers.csv", "text/csv")
_PLAN = _Kind("a2", "plan.json", "application/json")
# No media type is registered for safetensors.
_WEIGHTS = _Kind("a3", "model.safetensors", "application/octet-stream")
_PICTURE = _Kind("b1", "front.png", "image/png")


def last_stage(trial: FrozenTrial, stages: Path) -> Path | None:
    """Return the folder of a trial's last finished stage, if it has one that is still there.

    Args:
        trial: Any trial, also one of another program.
        stages: Folder of the workspace's stages.
    """
    finished = trial.user_attrs.get(STAGES)
    if not isinstance(finished, list) or not finished or not isinstance(finished[-1], Mapping):
        return None
    key = finished[-1].get("key")
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        return None
    folder = stages / key
    return folder if folder.is_dir() else None


def files_of_trial(trial: FrozenTrial, stages: Path) -> dict[str, str]:
    """List a trial's files as the dashboard reads them from its system attributes."""
    folder = last_stage(trial, stages)
    if folder is None:
        return {}
    listed: dict[str, str] = {}
    for kind, name in ((_LAYERS, PLAN), (_PLAN, PLAN), (_WEIGHTS, WEIGHTS)):
        if (folder / name).is_file():
            listed |= kind.listed(folder.name)
    return listed


def files_of_study(study_id: int) -> dict[str, str]:
    """List a study's pictures as the dashboard reads them from its system attributes."""
    return _PICTURE.listed(f"{study_id:x}")


class StageFiles:
    """An artifact store of Optuna's kind, for reading.

    Args:
        stages: Folder of the workspace's stages.
        layers: Makes the tables of layers.
        front_of: Reads the front of a study of this database by its identifier.
    """

    def __init__(self, stages: Path, layers: LayerTables, front_of: Callable[[int], ParetoFront]) -> None:
        self._stages = stages
        self._layers = layers
        self._front_of = front_of

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Open a file that is listed.

        Raises:
            HTTPResponse: 404, with what is wrong: it is gone, or damaged.
        """
        owner, _, suffix = artifact_id.partition("-")
        try:
            if suffix == _PICTURE.suffix:
                return _picture_of(self._front_of(int(owner, 16)))
            return self._of_stage(owner, suffix)
        except (OSError, ValueError, CompressSearchError) as error:
            raise _not_found(str(error)) from error

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Refuse; requests that would come to this are refused before."""
        raise _not_found("Files are not added here.")

    def remove(self, artifact_id: str) -> None:
        """Keep the file: a study that is deleted may share its stages with others."""

    def _of_stage(self, key: str, suffix: str) -> BinaryIO:
        names = {_LAYERS.suffix: PLAN, _PLAN.suffix: PLAN, _WEIGHTS.suffix: WEIGHTS}
        if not _KEY.fullmatch(key) or suffix not in names:
            raise ValueError(f"There is no file {key}-{suffix} here.")
        folder, name = self._stages / key, names[suffix]
        if (fault := fault_of(folder, (name,))) is not None:
            raise ValueError(f"The stored stage {key} is gone or damaged: {fault}")
        if suffix == _LAYERS.suffix:
            plan = CompressionPlan.load(folder / PLAN)
            return io.BytesIO(layers_csv(plan, self._layers.wait(folder)).encode())
        return (folder / name).open("rb")


def _picture_of(front: ParetoFront) -> BinaryIO:
    with TemporaryDirectory() as folder:
        path = Path(folder, _PICTURE.filename)
        draw_static(pareto_data(front), path)
        return io.BytesIO(path.read_bytes())


def _not_found(why: str) -> HTTPResponse:
    return HTTPResponse(why, status=404, headers={"Content-Type": "text/plain; charset=utf-8"})
