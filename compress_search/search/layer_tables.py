"""What became of each layer of a trial's model: with MACs where its task is known, else from the plan."""

from __future__ import annotations

import csv
import io
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from compress_search.plan import CompressionPlan, apply_plan
from compress_search.profile import ModelProfile, profile_model
from compress_search.reports.frames import layers_frame
from compress_search.reports.layers import LayerRow, layer_table
from compress_search.reports.plan_changes import plan_changes
from compress_search.stage_files import PLAN
from compress_search.task import Task

logger = logging.getLogger("compress_search")

Rows = tuple[LayerRow, ...]


class LayerTables:
    """Makes tables of layers with MACs, one at a time in a thread of its own, and keeps them.

    It builds models, which draws random numbers: not in a process that trains.

    Args:
        load_task: Makes the task; ``None`` if it is not known, then there are no tables.
    """

    def __init__(self, load_task: Callable[[], Task] | None) -> None:
        self._load_task = load_task
        self._lock = threading.Lock()
        self._asked: dict[Path, Future[Rows | None]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-tables")

    def ready(self, folder: Path) -> Rows | None:
        """Return the table of the plan in a stage's folder if it is made already; otherwise begin with it."""
        asked = self._ask(folder)
        return asked.result() if asked is not None and asked.done() else None

    def wait(self, folder: Path) -> Rows | None:
        """Return that table; ``None`` where the task is not known or does not fit the plan."""
        asked = self._ask(folder)
        return None if asked is None else asked.result()

    def close(self) -> None:
        """Finish the table that is being made, and begin no other."""
        self._thread.shutdown(cancel_futures=True)

    def _ask(self, folder: Path) -> Future[Rows | None] | None:
        if self._load_task is None:
            return None
        with self._lock:
            if folder not in self._asked:
                self._asked[folder] = self._thread.submit(self._make, folder)
            return self._asked[folder]

    def _make(self, folder: Path) -> Rows | None:
        if self._original is None:
            return None
        model, example, before = self._original
        try:
            plan = CompressionPlan.load(folder / PLAN)
            return layer_table(plan, before, profile_model(apply_plan(model, plan), example))
        except Exception as error:
            # The page is there all the same, with what the plan says.
            logger.warning("A table of layers has no MACs: %s", error)
            return None

    @cached_property
    def _original(self) -> tuple[nn.Module, Tensor, ModelProfile] | None:
        assert self._load_task is not None
        try:
            task = self._load_task()
            model, example = task.build_with_example()
            return model, example, profile_model(model, example)
        except Exception as error:
            logger.warning("Tables of layers have no MACs, because the task cannot be made: %s", error)
            return None


def layers_csv(plan: CompressionPlan, rows: Sequence[LayerRow] | None) -> str:
    """Write what a plan did as CSV, one row a layer.

    Args:
        plan: The plan.
        rows: The table with MACs, if there is one.
    """
    if rows is not None:
        return str(layers_frame(rows).to_csv(index=False, lineterminator="\n", float_format="%.4f"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("layer", "done", "left_alone"))
    for change in plan_changes(plan):
        writer.writerow((change.module, "; ".join(change.done), "; ".join(change.left_alone)))
    return text.getvalue()
