"""The STUDY argument that most commands take: a name in the workspace, or a study's folder."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress_search.exceptions import StudyError
from compress_search.workspace import WORKSPACE_VARIABLE, Workspace, default_workspace

if TYPE_CHECKING:
    from compress_search.config import StudyConfig
    from compress_search.search.study import CompressionStudy
    from compress_search.task import Task


@dataclass(frozen=True)
class StudyPlace:
    """Where a study lies.

    Attributes:
        folder: The study's own folder; its parent is the workspace.
        storage: URL of its database if the command line named one.
    """

    folder: Path
    storage: str | None

    @property
    def has_config(self) -> bool:
        """Whether the study was made by ``compress-search run``, so that its task can be made again."""
        return (self.folder / "config.yaml").is_file()

    def config(self) -> StudyConfig:
        """Read the configuration that ``compress-search run`` saved.

        Raises:
            StudyError: There is no such study, or it was made from Python.
            StudyMismatchError: The study's files are in another workspace.
            ConfigError: The file was changed, and is wrong now.
        """
        import dataclasses

        from compress_search.config import StudyConfig
        from compress_search.search.identity import check_place

        if not self.has_config:
            study = self.open()
            check_place(study.optuna_study, study.workspace)
            raise StudyError(
                f"The study {self.folder.name!r} was made from Python: {str(self.folder)!r} has no "
                "config.yaml, so its model and data are not known here. Do this from Python: "
                f'load_study("{self.folder.name}", task, workspace="{self.folder.parent}").'
            )
        config = StudyConfig.load(self.folder / "config.yaml")
        # The folder may have been moved since the configuration was saved.
        return dataclasses.replace(
            config, workspace=self.folder.parent, storage=self.storage or config.storage
        )

    def open(self, task: Task | None = None, *, device: str | None = None) -> CompressionStudy:
        """Open the study.

        Args:
            task: Its task, for what needs the model or the data.
            device: Where to compute; ``None`` takes the first GPU if there is one.

        Raises:
            StudyError: The database has no such study.
        """
        from compress_search.search.study import load_study

        return load_study(
            self.folder.name,
            task,
            workspace=self.folder.parent,
            storage=self._storage(),
            device=device,
        )

    def _storage(self) -> str | None:
        # Not through config(): a study can be looked at where its task or its GPU is not to be had.
        if self.storage is not None or not self.has_config:
            return self.storage
        from compress_search.yaml_settings import parse_yaml

        path = self.folder / "config.yaml"
        values = parse_yaml(path.read_text(encoding="utf-8"), source=str(path))
        storage: str | None = values.get("storage")
        return storage


def add_study_argument(parser: argparse.ArgumentParser, *, or_else: str = "") -> None:
    """Add STUDY and the options that say where to look for it.

    Args:
        parser: Where to.
        or_else: What else may be given in the place of a study, for the help.
    """
    parser.add_argument(
        "study", metavar="STUDY", help=f"a study's name, or its folder (runs/digits){or_else}"
    )
    parser.add_argument(
        "--workspace",
        metavar="DIR",
        default=default_workspace(),
        help=f"where studies are looked up by name (default: ${WORKSPACE_VARIABLE}, else runs)",
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="the study's database, if it is neither the workspace's nor configured",
    )


def add_accept_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that goes on with a study although something has changed."""
    parser.add_argument(
        "--accept-changed",
        action="store_true",
        help="go on although the task, package versions, workspace or settings are others than before; what "
        "differs is noted in the study",
    )


def find_study(args: argparse.Namespace) -> StudyPlace:
    """Find the study that the command line names.

    Whether it exists is known when it is opened: a study that was made from Python may have no folder yet.
    """
    given = Path(args.study)
    # A name alone is a folder where the current one is a workspace: the paths that we print are like that.
    lies_here = Workspace(given.parent).stages.is_dir() and (given / "config.yaml").is_file()
    is_folder = os.sep in args.study or given.name in ("", "..") or lies_here
    folder = given if is_folder else Path(args.workspace) / given
    return StudyPlace(folder.resolve(), args.storage)
