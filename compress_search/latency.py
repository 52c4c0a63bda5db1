"""How long a model takes on this machine: MACs are not latency, so it is measured.

The models that are compared run in turn, call for call, so that whatever else the machine does meanwhile
meets all of them alike.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress_search.device import choose_device
from compress_search.exceptions import ConfigError, ModelError
from compress_search.programs import brief, read_program, write_onnx, write_program

ORIGINAL, COMPRESSED = "original", "compressed"
EAGER, COMPILED, ONNX_RUNTIME = "eager", "torch.compile", "onnxruntime"

_LEAST_RUNS, _MOST_RUNS = 20, 1_000
_WARM_UP_RUNS = 5
_FAR_LESS = 0.8
"""A speed-up below this share of what the MACs promise is worth a remark."""
_CSV_TITLES = {
    "runtime": "runtime",
    "batch": "batch",
    "model": "model",
    "median": "median_s",
    "lower": "lower_s",
    "upper": "upper_s",
    "runs": "runs",
    "left_out": "left_out",
}


@dataclass(frozen=True)
class Spread:
    """The times of many runs, in seconds.

    Attributes:
        median: Half of the runs took no longer.
        lower: The first quartile: a quarter took no longer.
        upper: The third quartile.
        runs: How many there were, the warm-up not counted.
    """

    median: float
    lower: float
    upper: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Sum up at least two runs."""
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper, len(seconds))


@dataclass(frozen=True)
class LatencyRow:
    """One runtime at one batch size.

    Attributes:
        runtime: A key of :data:`RUNTIMES`.
        batch: Examples a call.
        times: By the model's name; empty if it was left out.
        reason: Why it was left out; ``None`` if it was not.
    """

    runtime: str
    batch: int
    times: Mapping[str, Spread]
    reason: str | None = None

    @property
    def speed_up(self) -> float | None:
        """How many times faster the compressed model is than the original, by the medians."""
        if ORIGINAL not in self.times or COMPRESSED not in self.times:
            return None
        return self.times[ORIGINAL].median / self.times[COMPRESSED].median


@dataclass(frozen=True)
class LatencyTable:
    """What was measured, and on what.

    Attributes:
        device: The processor or GPU, in words.
        threads: Of the CPU.
        torch: Its version.
        mac_ratio: MACs of the compressed model / MACs of the original; ``None`` if it is not known.
        rows: The measurements.
    """

    device: str
    threads: int
    torch: str
    mac_ratio: float | None
    rows: tuple[LatencyRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values; all times are in seconds."""
        return dataclasses.asdict(self) | {"rows": [dataclasses.asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> LatencyTable:
        """Read what :meth:`to_dict` wrote."""
        rows = tuple(
            LatencyRow(**row | {"times": {name: Spread(**times) for name, times in row["times"].items()}})
            for row in value["rows"]
        )
        return cls(**dict(value) | {"rows": rows})

    @property
    def remarks(self) -> list[str]:
        """What a reader should know who expects that fewer MACs are as much faster."""
        if self.mac_ratio is None:
            return []
        promised = 1 / self.mac_ratio
        return [
            f"{row.runtime}, batch {row.batch}: {promised:.2f} times fewer MACs are only "
            f"{row.speed_up:.2f} times faster."
            for row in self.rows
            if row.speed_up is not None and row.speed_up < _FAR_LESS * promised
        ]

    def cells(self) -> list[list[str]]:
        """The table as text, its titles first; times in milliseconds as ``median (lower-upper)``."""
        # In this order, also after a file that has them in another.
        measured = {name for row in self.rows for name in row.times}
        names = [name for name in (ORIGINAL, COMPRESSED) if name in measured] or [COMPRESSED]
        titles = ["runtime", "batch", *(f"{name}, ms" for name in names), "speed-up"]
        return [titles, *(_cells_of(row, names) for row in self.rows)]

    @property
    def caption(self) -> str:
        """What the numbers are, in one line."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"Median (quartiles) on {self.device}, {threads}, torch {self.torch}."

    def to_markdown(self) -> str:
        """The table in Markdown, with what is to be known of it."""
        titles, *rows = self.cells()
        lines = [titles, ["---", *["--:"] * (len(titles) - 1)], *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        remarks = "".join(f"\n* {remark}" for remark in self.remarks)
        return f"{table}\n\n{self.caption}\n{remarks}".rstrip() + "\n"

    def to_csv(self) -> str:
        """One line for each runtime, batch size and model; times in seconds."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(_CSV_TITLES), lineterminator="\n")
        writer.writerow(_CSV_TITLES)
        writer.writerows(self.records())
        return text.getvalue()

    def records(self) -> list[dict[str, Any]]:
        """One for each runtime, batch size and model, or for a runtime and batch size that were left out.

        Returns:
            ``runtime`` and ``batch``; then ``model``, the ``median``, ``lower`` and ``upper`` quartile of a
            call's time in seconds, and how many ``runs`` there were; or ``left_out``, why there are none.
        """
        records: list[dict[str, Any]] = []
        for row in self.rows:
            common = {"runtime": row.runtime, "batch": row.batch}
            records += [{**common, "model": name, **vars(times)} for name, times in row.times.items()]
            if row.reason is not None:
                records.append({**common, "left_out": row.reason})
        return records


def _cells_of(row: LatencyRow, names: Sequence[str]) -> list[str]:
    if row.reason is not None:
        left_out = [f"left out: {row.reason}", *[""] * (len(names) - 1)]
        return [row.runtime, str(row.batch), *left_out, ""]
    shown = [
        f"{1e3 * t.median:.2f} ({1e3 * t.lower:.2f}-{1e3 * t.upper:.2f})"
        for t in (row.times[name] for name in names)
    ]
    speed_up = "" if row.speed_up is None else f"{row.speed_up:.2f}"
    return [row.runtime, str(row.batch), *shown, speed_up]


def measure_latency(
    models: Mapping[str, nn.Module],
    example: Tensor,
    *,
    batches: Sequence[int] = (1, 32),
    runtimes: Sequence[str] = (EAGER, COMPILED, ONNX_RUNTIME),
    device: torch.device | str = "cpu",
    threads: int | None = None,
    seconds: float = 2.0,
    mac_ratio: float | None = None,
) -> LatencyTable:
    """Measure how long models take for one call.

    Every model runs five times for warm-up, and then in turn with the others until they have run for
    ``seconds`` each, at least 20 and at most 1,000 times. A runtime that is missing or fails is left out with
    its reason.

    Args:
        models: By name, in evaluation mode; :data:`ORIGINAL` and :data:`COMPRESSED` are compared.
        example: ``(batch, ...)``, something the models accept; its first example is repeated.
        batches: How many examples a call has.
        runtimes: Keys of :data:`RUNTIMES`.
        device: Where the models run. They are moved there, and are left there.
        threads: Of the CPU, for this call; ``None`` leaves them as they are.
        seconds: How long each model is measured in each case.
        mac_ratio: See :class:`LatencyTable`.

    Raises:
        ConfigError: A number or a runtime is not one of these.
        DeviceError: This machine has no such device.
    """
    _check(batches, runtimes, threads, seconds)
    where = choose_device(str(device))
    models = {name: model.to(where) for name, model in models.items()}
    with _threads(threads) as used:
        rows = tuple(
            _measure(models, example, runtime, batch, device=where, threads=used, seconds=seconds)
            for runtime in runtimes
            for batch in batches
        )
    return LatencyTable(_name_of(where), used, torch.__version__, mac_ratio, rows)


def load_program(path: Path) -> tuple[nn.Module, Tensor]:
    """Read a ``torch.export`` program.

    Args:
        path: The file, or the folder of an export that holds it.

    Returns:
        The model, and an example input ``(batch, ...)`` that it was exported with.

    Raises:
        ModelError: The file is none.
    """
    file = path / "model.pt2" if path.is_dir() else path
    remedy = "Give model.pt2 of an export, or its folder: `compress-search export STUDY --trial N` makes one."
    if not file.is_file():
        raise ModelError(f"There is no file {str(file)!r}. {remedy}")
    try:
        program = read_program(file)
        (example,), _ = program.example_inputs
    except Exception as error:
        # Whatever the reader meets in a file that is something else.
        raise ModelError(
            f"{str(file)!r} is no torch.export program of one input ({brief(error)}). {remedy}"
        ) from error
    return program.module(), example


def _check(batches: Sequence[int], runtimes: Sequence[str], threads: int | None, seconds: float) -> None:
    faults = [f"batch is {batch!r}; it must be 1 or more." for batch in batches if batch < 1]
    faults += [
        f"There is no runtime {name!r}; there are {', '.join(RUNTIMES)}."
        for name in runtimes
        if name not in RUNTIMES
    ]
    if threads is not None and threads < 1:
        faults.append(f"threads is {threads!r}; it must be 1 or more.")
    if not seconds >= 0:
        faults.append(f"seconds is {seconds!r}; it must be 0 or more.")
    if faults:
        raise ConfigError(faults)


def _measure(
    models: Mapping[str, nn.Module],
    example: Tensor,
    runtime: str,
    batch: int,
    *,
    device: torch.device,
    threads: int,
    seconds: float,
) -> LatencyRow:
    inputs = example[:1].repeat(batch, *[1] * (example.ndim - 1)).to(device)
    try:
        torch.compiler.reset()
        calls = {name: RUNTIMES[runtime](model, inputs, threads) for name, model in models.items()}
        return LatencyRow(runtime, batch, _times(calls, device, seconds))
    except Exception as error:
        # Compilers, exporters and runtimes fail in as many ways as there are models; the others still count.
        return LatencyRow(runtime, batch, {}, brief(error))


def _times(calls: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, Spread]:
    for call in calls.values():
        for _ in range(_WARM_UP_RUNS):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for run in range(_MOST_RUNS):
        if run >= _LEAST_RUNS and time.perf_counter() - begun >= seconds * len(calls):
            break
        for name, call in calls.items():
            _wait_for(device)
            start = time.perf_counter()
            call()
            _wait_for(device)
            taken[name].append(time.perf_counter() - start)
    return {name: Spread.of(times) for name, times in taken.items()}


def _wait_for(device: torch.device) -> None:
    """A GPU answers before it has computed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _eager(model: nn.Module, inputs: Tensor, _threads: int) -> Callable[[], Any]:
    return lambda: _call(model, inputs)


def _compiled(model: nn.Module, inputs: Tensor, _threads: int) -> Callable[[], Any]:
    compiled: Any = torch.compile(model, dynamic=False)
    return lambda: _call(compiled, inputs)


def _call(run: Callable[[Tensor], Any], inputs: Tensor) -> Any:
    with torch.inference_mode():
        return run(inputs)


def _onnx_runtime(model: nn.Module, inputs: Tensor, threads: int) -> Callable[[], Any]:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeError("it is not installed: pip install 'compress-search[onnx]'") from error
    if inputs.device.type != "cpu":
        raise RuntimeError("it is measured on the CPU alone")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        program = write_program(Path(folder) / "model.pt2", model, inputs)
        path = write_onnx(Path(folder) / "model.onnx", program, model)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: inputs.numpy()}
    return lambda: session.run(None, feed)


RUNTIMES: Mapping[str, Callable[[nn.Module, Tensor, int], Callable[[], Any]]] = {
    EAGER: _eager,
    COMPILED: _compiled,
    ONNX_RUNTIME: _onnx_runtime,
}
"""What runs a model: given the model, its inputs ``(batch, ...)`` and the threads, a function of one call."""


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpus.read_text().splitlines() if cpus.is_file() else [])
        if line.startswith("model name")
    ]
    return next(iter(names), platform.processor() or platform.machine())
