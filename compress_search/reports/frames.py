"""The tables of a study as pandas data frames with typed columns, and as CSV and Parquet files.

What is not known is missing: ``NaN`` in columns of float64, else ``NA``. A column never changes its type with
what is in it, but for the search variables, whose types are those of their values.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from compress_search.latency import LatencyTable
from compress_search.reports.layers import LayerRow
from compress_search.reports.sensitivity import StageSensitivity
from compress_search.reports.trials import StageTime
from compress_search.results import Candidate, ParetoFront, param_names
from compress_search.workspace import write_bytes_atomically

_TRIAL = {
    "number": "int64",
    "finalist_of": "Int64",
    "state": "string",
    "feasible": "bool",
    "on_front": "bool",
}
_OUTCOME = {
    "mac_ratio": "float64",
    "accuracy": "float64",
    "drop": "float64",
    "macs": "Int64",
    "params": "Int64",
    "seconds": "float64",
}
_STAGE = {
    "name": "string",
    "accuracy": "float64",
    "mac_ratio": "float64",
    "seconds": "float64",
    "reused": "boolean",
    "key": "string",
}
_LAYER = {
    "layer": "string",
    "kind": "string",
    "done": "string",
    "macs_before": "int64",
    "macs_after": "int64",
    "mac_ratio": "float64",
    "left_alone": "string",
}
_CELL = {
    "stage": "int64",
    "method": "string",
    "unit": "string",
    "size": "int64",
    "loss": "float64",
    "measured": "bool",
}
_TIME = {
    "stage": "string",
    "computed": "int64",
    "seconds": "float64",
    "reused": "int64",
    "saved": "float64",
    "teacher_saved": "float64",
}

_LATENCY = {
    "runtime": "string",
    "batch": "int64",
    "model": "string",
    "median": "float64",
    "lower": "float64",
    "upper": "float64",
    "runs": "Int64",
    "left_out": "string",
    "device": "string",
    "threads": "int64",
    "torch": "string",
}


def trials_frame(front: ParetoFront) -> pd.DataFrame:
    """Make one row a trial.

    Returns:
        ``number``; ``finalist_of``, the trial whose model it trained on; ``state``; ``feasible``;
        ``on_front``; ``param_<name>`` for each search variable; ``mac_ratio`` in (0, 1]; ``accuracy`` and
        ``drop``, as ``Task.evaluate`` gives them; ``macs`` for one example; ``params``; ``seconds`` of wall
        time, reused stages not counted; for each stage, from 1, ``stage_<n>_name``, ``_accuracy``,
        ``_mac_ratio``, ``_seconds`` that computing it took, ``_reused`` and ``_key``; ``reason``, why it was
        pruned or failed.
    """
    candidates = front.candidates
    best = {candidate.number for candidate in front.best}
    names = param_names(candidates)
    stages = max((len(candidate.stages) for candidate in candidates), default=0)
    types = {
        **_TRIAL,
        **{
            f"param_{name}": _type_of([c.params[name] for c in candidates if name in c.params])
            for name in names
        },
        **_OUTCOME,
        **{f"stage_{n}_{what}": kind for n in range(1, stages + 1) for what, kind in _STAGE.items()},
        "reason": "string",
    }
    return _frame([_trial_row(c, on_front=c.number in best) for c in candidates], types)


def layers_frame(rows: Sequence[LayerRow]) -> pd.DataFrame:
    """Make one row a layer of the original model.

    Returns:
        ``layer``, its name; ``kind``, its class; ``done``, for example ``"spatial SVD, rank 9"``;
        ``macs_before`` and ``macs_after`` for one example; ``mac_ratio``, the one over the other (1 for a
        layer that does not run); ``left_alone``, why a method did not touch it.
    """
    values = [
        {name: row.ratio if name == "mac_ratio" else getattr(row, name) for name in _LAYER} for row in rows
    ]
    return _frame(values, _LAYER)


def sensitivity_frame(sensitivities: Sequence[StageSensitivity]) -> pd.DataFrame:
    """Make one row a cell of the sensitivity tables.

    Returns:
        ``stage``, the number of the compressing stage, from 1; its ``method``; ``unit``, a layer or group of
        channels of the model that the stage was given; ``size``, its rank or number of channels (or of
        blocks of them); ``loss``, the divergence in nats per example, or the drop of the score;
        ``measured``, or else filled in from the measured ones.
    """
    values = [
        {"stage": stage, "method": sensitivity.method, **vars(cell)}
        for stage, sensitivity in enumerate(sensitivities, start=1)
        for cell in sensitivity.table.cells
    ]
    return _frame(values, _CELL)


def times_frame(times: Sequence[StageTime]) -> pd.DataFrame:
    """Make one row a kind of stage.

    Returns:
        ``stage``, its name; ``computed``, how often; ``seconds`` of wall time of those in all; ``reused``,
        how often; ``saved``, the seconds that computing those had taken; ``teacher_saved``, the seconds that
        the computed ones saved since what the original says of the training batches was known.
    """
    return _frame([{"stage": row.name, **vars(row)} for row in times], _TIME)


def latency_frame(table: LatencyTable | None) -> pd.DataFrame:
    """Make one row a runtime, batch size and model, or a runtime and batch size that were left out.

    Args:
        table: What was measured; ``None`` makes no rows.

    Returns:
        ``runtime``; ``batch``, the examples a call; ``model``, ``"original"`` or ``"compressed"``;
        ``median``, ``lower`` and ``upper`` quartile of a call's time in seconds; ``runs``, how many calls;
        ``left_out``, why there are none; ``device``, the processor or GPU; ``threads`` of the CPU;
        ``torch``, its version.
    """
    if table is None:
        return _frame([], _LATENCY)
    where = {"device": table.device, "threads": table.threads, "torch": table.torch}
    return _frame([record | where for record in table.records()], _LATENCY)


def write_frames(folder: Path, frames: Mapping[str, pd.DataFrame]) -> tuple[Path, ...]:
    """Write data frames as ``<name>.csv``, and as ``<name>.parquet`` if pyarrow is installed.

    Files of an empty table without rows are written too, so that a file always is of the last time.

    Args:
        folder: Where to; each file is replaced whole.
        frames: The tables by name.

    Returns:
        The files, all CSV first.
    """
    writers: dict[str, Callable[[pd.DataFrame], bytes]] = {"csv": _as_csv}
    if importlib.util.find_spec("pyarrow") is not None:
        writers["parquet"] = _as_parquet
    files = []
    for ending, write in writers.items():
        for name, frame in frames.items():
            files.append(folder / f"{name}.{ending}")
            write_bytes_atomically(files[-1], write(frame))
    return tuple(files)


def _as_csv(frame: pd.DataFrame) -> bytes:
    return bytes(frame.to_csv(index=False, lineterminator="\n").encode("utf-8"))


def _as_parquet(frame: pd.DataFrame) -> bytes:
    return bytes(frame.to_parquet(None, engine="pyarrow", index=False))


def _trial_row(candidate: Candidate, *, on_front: bool) -> dict[str, Any]:
    finished = candidate.stages[-1] if candidate.stages and candidate.state == "complete" else None
    row = {
        "on_front": on_front,
        **{f"param_{name}": value for name, value in candidate.params.items()},
        "macs": None if finished is None else finished.macs,
        "params": None if finished is None else finished.params,
    }
    for number, stage in enumerate(candidate.stages, start=1):
        row |= {f"stage_{number}_{what}": getattr(stage, what) for what in _STAGE}
    return {**vars(candidate), **row}


def _type_of(values: Sequence[float | int | str]) -> str:
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return "boolean"
    if kinds <= {int}:
        return "Int64"
    return "float64" if kinds <= {int, float} else "string"


def _frame(rows: Sequence[Mapping[str, Any]], types: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame(
        {name: _column([row.get(name) for row in rows], kind) for name, kind in types.items()}
    )


def _column(values: Sequence[Any], kind: str) -> pd.Series:
    # A variable may have choices of several types, which are text then.
    texts = kind == "string"
    return pd.Series([str(v) if texts and v is not None else v for v in values], dtype=kind)
