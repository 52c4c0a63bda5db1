"""The sensitivity table: how much the output suffers when one unit alone is compressed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from compress_search.exceptions import WorkspaceError
from compress_search.workspace import write_json_atomically, write_text_atomically


@dataclass(frozen=True)
class Cell:
    """One unit at one size, everything else as it was.

    Attributes:
        unit: Name of the unit.
        size: Its rank or number of blocks.
        loss: What the output lost: the mean divergence on the scoring samples (nats per sample for
            classifiers), or the drop of the user's own score.
        measured: Whether the loss was measured, or follows from the measured ones of the same unit; see
            :func:`compress_search.selection.sensitivity.filled_in`.
    """

    unit: str
    size: int
    loss: float
    measured: bool = True


@dataclass(frozen=True)
class SensitivityTable:
    """All cells of one model and method; AIMET calls it the evaluation dictionary.

    Attributes:
        cells: By unit in forward order, by size ascending. Full sizes are not in it: they lose nothing.
        fingerprint: Of the model and the method that were measured; see
            :func:`compress_search.compression.fingerprint_of`.
    """

    cells: tuple[Cell, ...]
    fingerprint: str = ""

    @cached_property
    def _by_unit(self) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for cell in self.cells:
            found.setdefault(cell.unit, {})[cell.size] = cell.loss
        return {unit: dict(sorted(losses.items())) for unit, losses in found.items()}

    @property
    def units(self) -> tuple[str, ...]:
        """The units that were measured."""
        return tuple(self._by_unit)

    def losses(self, unit: str) -> Mapping[int, float]:
        """The loss by size, ascending.

        Raises:
            KeyError: The unit was not measured.
        """
        return self._by_unit[unit]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a cell: ``unit``, ``size``, ``loss`` and ``measured``; the columns are typed."""
        columns = {"unit": "string", "size": "int64", "loss": "float64", "measured": "bool"}
        rows = [(cell.unit, cell.size, cell.loss, cell.measured) for cell in self.cells]
        return pd.DataFrame(rows, columns=list(columns)).astype(columns)

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-able values."""
        return {"fingerprint": self.fingerprint, "cells": [asdict(cell) for cell in self.cells]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> SensitivityTable:
        """Read what :meth:`to_dict` wrote."""
        return cls(tuple(Cell(**cell) for cell in value["cells"]), value["fingerprint"])

    def save(self, path: Path | str) -> None:
        """Write the table as JSON, or, to a path that ends in ``.csv``, its cells as CSV."""
        path = Path(path)
        if path.suffix == ".csv":
            write_text_atomically(path, self.to_dataframe().to_csv(index=False))
        else:
            write_json_atomically(path, self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> SensitivityTable:
        """Read the JSON that :meth:`save` wrote.

        Raises:
            WorkspaceError: The file cannot be read, or is no such table.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WorkspaceError(
                f"{str(path)!r} holds no sensitivity table ({type(error).__name__}: {error}). Give a JSON "
                "file that SensitivityTable.save wrote."
            ) from error
