"""One sitting with a study: work on it, then answer. `run`, `resume` and `finalize` share it."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable

from compress_search.cli.answer import print_answer, shorten
from compress_search.cli.log import logging_to_file, logging_to_terminal
from compress_search.config import StudyConfig
from compress_search.progress import Progress
from compress_search.search.database_url import PASSWORD_VARIABLE, parse_url, password_of
from compress_search.search.study import CompressionStudy, create_study
from compress_search.workspace import Workspace

logger = logging.getLogger("compress_search")


def search_and_answer(config: StudyConfig, *, accept_changed: bool) -> int:
    """Create or continue the study of a configuration up to its trials, and tell what came of it.

    Takes, returns and raises what :func:`work_and_answer` does.
    """

    def search(study: CompressionStudy, progress: Progress) -> None:
        study.optimize(
            config.n_trials,
            stop_when=config.stop_when,
            checkpoint_seconds=config.checkpoint_seconds,
            progress=progress,
        )

    return work_and_answer(config, search, accept_changed=accept_changed)


def open_study(config: StudyConfig, *, accept_changed: bool) -> CompressionStudy:
    """Create the study of a configuration, or continue it, and save the configuration in its folder.

    Raises:
        CompressSearchError: Something is wrong with the task, the workspace or the stored study.
    """
    settings = {item.name: getattr(config.search, item.name) for item in dataclasses.fields(config.search)}
    study = create_study(
        config.name,
        config.load_task(),
        workspace=config.workspace,
        storage=config.storage,
        device=config.device,
        accept_changed=accept_changed,
        **settings,
    )
    config.save(study.folder / "config.yaml")
    if config.storage is not None and password_of(parse_url(config.storage)) is not None:
        logger.info(
            "The database's password is not saved. To resume the study, or to join it, set $%s.",
            PASSWORD_VARIABLE,
        )
    return study


def work_and_answer(
    config: StudyConfig, work: Callable[[CompressionStudy, Progress], None], *, accept_changed: bool
) -> int:
    """Open or create the study of a configuration, work on it, and tell what came of it.

    Args:
        config: The study's configuration.
        work: What to do.
        accept_changed: Go on with a study although something has changed.

    Returns:
        The exit status: 0, 1 if no trial is feasible, 130 after Ctrl-C.

    Raises:
        CompressSearchError: Something is wrong with the task, the workspace or the stored study.
    """
    with logging_to_terminal() as console:
        try:
            study = open_study(config, accept_changed=accept_changed)
            with logging_to_file(study.folder / "study.log"):
                work(study, Progress(console))
                return print_answer(study, config.max_drop)
        except KeyboardInterrupt:
            print(f"\nInterrupted. {_how_to_go_on(config)}", file=sys.stderr)
            return 130


def _how_to_go_on(config: StudyConfig) -> str:
    folder = Workspace(config.workspace).study_folder(config.name)
    if not (folder / "config.yaml").is_file():
        return "The study had not begun; run the same command again."
    return f"What is finished is kept. Go on with: compress-search resume {shorten(folder)}"
