"""One sitting with a study: search up to its number of trials, then answer. `run` and `resume` share it."""

from __future__ import annotations

import sys
from pathlib import Path

from compress_search.cli.log import logging_to_file, logging_to_terminal
from compress_search.config import StudyConfig
from compress_search.exceptions import StudyError
from compress_search.progress import Progress
from compress_search.results import Candidate
from compress_search.search.study import CompressionStudy, create_study
from compress_search.workspace import Workspace


def search_and_answer(config: StudyConfig) -> int:
    """Create or continue the study of a configuration, and tell what came of it.

    Returns:
        The exit status: 0, 1 if no trial is feasible yet, 130 after Ctrl-C.

    Raises:
        CompressSearchError: Something is wrong with the task, the workspace or the stored study.
    """
    with logging_to_terminal() as console:
        try:
            task = config.load_task()
            study = create_study(
                config.name,
                task,
                workspace=config.workspace,
                storage=config.storage,
                device=config.device,
                **config.search_arguments(),
            )
            config.save(study.folder / "config.yaml")
            with logging_to_file(study.folder / "study.log"):
                study.optimize(config.n_trials, progress=Progress(console))
                return _answer(study, config.max_drop)
        except KeyboardInterrupt:
            _say_how_to_resume(config)
            return 130


def _answer(study: CompressionStudy, max_drop: float | None) -> int:
    front, reference = study.front(), study.reference
    print(f"Original: accuracy {100 * reference.accuracy:.2f} %, {reference.macs:,} MACs, ", end="")
    print(f"{reference.params:,} parameters.\n")
    try:
        chosen, remark = _choose(study, max_drop)
    except StudyError as error:
        report = study.report()
        print(f"{error}\n\nReport    {_shown(report.page)}")
        return 1
    print(f"Front of the study {study.name!r}:\n{front}\n")
    print(f"{remark}\n")
    if study.task is not None and study.task.test is not None:
        score = study.test(chosen)
        print(f"Test accuracy: original {100 * score.original:.2f} %, ", end="")
        print(f"trial {chosen.number} {100 * score.candidate:.2f} %.\n")
    exported = study.export(chosen)
    report = study.report()
    for label, path in (
        ("Report", report.page),
        ("Plot", report.plot),
        ("Picture", report.picture),
        ("Model", exported.folder),
    ):
        print(f"{label:<10}{_shown(path)}")
    return 0


def _choose(study: CompressionStudy, max_drop: float | None) -> tuple[Candidate, str]:
    why = "the most accurate one in the band"
    if max_drop is not None:
        why = f"the fewest MACs within a drop of {100 * max_drop:g} points"
        try:
            return (chosen := study.best(max_drop=max_drop)), _described(chosen, why)
        except StudyError:
            # No feasible candidate at all is not mended by asking for less: best() below says so.
            why = f"no feasible trial drops at most {100 * max_drop:g} points, so the most accurate one"
    return (chosen := study.best()), _described(chosen, why)


def _described(chosen: Candidate, why: str) -> str:
    assert chosen.accuracy is not None and chosen.mac_ratio is not None and chosen.drop is not None
    return (
        f"Chosen: trial {chosen.number} ({why}), mac_ratio {chosen.mac_ratio:.4f}, validation accuracy "
        f"{100 * chosen.accuracy:.2f} %, drop {100 * chosen.drop:+.2f} points."
    )


def _say_how_to_resume(config: StudyConfig) -> None:
    folder = Workspace(config.workspace).study_folder(config.name)
    if (folder / "config.yaml").is_file():
        how = f"What is finished is kept. Go on with: compress-search resume {_shown(folder)}"
    else:
        how = "The study had not begun. Run the same command again."
    print(f"\nInterrupted. {how}", file=sys.stderr)


def _shown(path: Path) -> str:
    """A path as short as it can be: relative to the current folder if it lies there."""
    resolved = path.resolve()
    return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(path)
