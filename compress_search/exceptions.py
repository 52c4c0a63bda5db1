"""The errors a user can meet, as one tree.

Every message says what was wrong, the value that was seen, and the remedy.
"""

from __future__ import annotations


class CompressSearchError(Exception):
    """Base of every error that compress_search raises on purpose."""


class TaskError(CompressSearchError):
    """The user's side (model, data, evaluation) cannot be used as it is."""


class EvaluationError(TaskError):
    """An ``evaluate`` function raised, or returned something that is not a finite number."""


class ModelError(CompressSearchError):
    """A network cannot be profiled, traced or compressed."""


class RatioError(CompressSearchError):
    """A MAC ratio, target or tolerance is out of range, or cannot be reached."""


class PlanError(CompressSearchError):
    """A compression plan cannot be read, or does not fit the model it is applied to."""


class ConfigError(CompressSearchError):
    """A configuration is wrong. All its faults are in one message."""

    def __init__(self, faults: list[str], *, source: str = "configuration") -> None:
        self.faults = tuple(faults)
        lines = "\n".join(f"  - {fault}" for fault in faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__(f"{source} has {count}:\n{lines}")


class DeviceError(CompressSearchError):
    """There is no such device, or none on this machine."""


class WorkspaceError(CompressSearchError):
    """The workspace folder cannot be created, written or read."""


class LostStageError(WorkspaceError):
    """A stored stage was damaged or removed since it was found. Who wants it next computes it again."""


class UnreadableStageError(WorkspaceError):
    """A stored stage cannot be read now, which says nothing of whether it is damaged."""


class StudyError(CompressSearchError):
    """A study cannot be created, found or answered from."""


class DatabaseError(StudyError):
    """The database of a study was away for longer than it is waited for. Nothing that is finished is lost."""


class StudyMismatchError(StudyError):
    """A stored study was made with other settings than those asked for now."""


class TrainingError(CompressSearchError):
    """Fine-tuning cannot go on (for example: the loss is not a finite number)."""
