"""The report: one self-contained HTML page, the plot alone, its picture, and all tables as files.

Everything from outside (names, reasons, settings) is escaped by jinja2; what is not escaped is made here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from compress_search.latency import LatencyTable
from compress_search.plain_text import duration
from compress_search.reports.answer import answer_facts, summary_of, why_no_answer
from compress_search.reports.figure_look import DARK, recoloured
from compress_search.reports.figures import StudyFigure, study_figures
from compress_search.reports.formatting import count, ratio, stage_label
from compress_search.reports.frames import (
    latency_frame,
    layers_frame,
    sensitivity_frame,
    times_frame,
    trials_frame,
    write_frames,
)
from compress_search.reports.layers import LayerRow, total_row
from compress_search.reports.pareto import ParetoData, pareto_data
from compress_search.reports.pareto_picture import draw_static
from compress_search.reports.provenance import (
    PLAN_FILE,
    PROGRAM_FILE,
    WEIGHTS_FILE,
    loading_code,
    package_versions,
    program_loading_code,
)
from compress_search.reports.sensitivity import StageSensitivity
from compress_search.reports.story import story_of
from compress_search.reports.trials import stage_times
from compress_search.results import Candidate, ParetoFront, format_param, param_names
from compress_search.stage_files import PLAN, WEIGHTS
from compress_search.workspace import write_text_atomically


@dataclass(frozen=True)
class ReportFiles:
    """Where the parts of a report lie.

    Attributes:
        page: The whole report, ``report.html``. It needs no other file and no network.
        plot: The interactive figure alone, ``front.html``.
        picture: The figure as a picture, ``front.png``.
        table: The trials, ``candidates.csv``.
        more_tables: The layers of the chosen model, its sensitivity tables, its latency and the time of the
            stages, as CSV; and if pyarrow is installed all tables as Parquet. What is not known has no rows.
    """

    page: Path
    plot: Path
    picture: Path
    table: Path
    more_tables: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Details:
    """What is known of the chosen model beside its numbers.

    Attributes:
        layers: What became of each of its layers.
        sensitivities: The tables that its stages chose their sizes by.
        test: Accuracy of the original and of it on the test data, if measured.
        latency: How long it and the original take, if measured.
        export_folder: Where it was exported to, if it was.
        fault: What is wrong with its stored files, if anything.
    """

    layers: Sequence[LayerRow] = ()
    sensitivities: Sequence[StageSensitivity] = ()
    test: tuple[float, float] | None = None
    latency: LatencyTable | None = None
    export_folder: Path | None = None
    fault: str | None = None


def write_report(
    folder: Path,
    *,
    title: str,
    front: ParetoFront,
    chosen: Candidate | None,
    details: Details | None = None,
    settings: Mapping[str, Any] | None = None,
    refresh: float | None = None,
) -> ReportFiles:
    """Write a study's report.

    Args:
        folder: Where to; it is created. Each file is replaced whole.
        title: The page's heading.
        front: The study's candidates.
        chosen: The model to ship, if there is one.
        details: What else is known of it.
        settings: How the study was set up. Nested mappings and dataclasses are written as ``outer.inner``.
        refresh: The page reads itself again after so many seconds; ``None`` if it is to stay as it is.

    Returns:
        The files.

    Raises:
        OSError: The folder cannot be written.
    """
    details = Details() if chosen is None or details is None else details
    data = pareto_data(front, chosen=chosen)
    figures = {
        figure.name: figure
        for figure in study_figures(
            front, chosen=chosen, layers=details.layers, sensitivities=details.sensitivities
        )
    }
    times = stage_times(candidate.stages for candidate in front.candidates)
    frames = {
        "candidates": trials_frame(front),
        "layers": layers_frame(details.layers),
        "sensitivity": sensitivity_frame(details.sensitivities),
        "latency": latency_frame(details.latency),
        "stages": times_frame(times),
    }
    flat = _flat(settings or {})
    common = {"title": title, "summary": summary_of(front), "refresh": refresh}
    drawn = {name: _drawn(figure) for name, figure in figures.items()}
    environment = _environment(data)
    page = environment.get_template("report.html.j2").render(
        **common,
        figures=figures,
        drawn=drawn,
        chosen=chosen,
        answer=[] if chosen is None else answer_facts(chosen, front, scale=data.scale, test=details.test),
        latency=details.latency,
        code=None if chosen is None else _code(chosen, details),
        fault=details.fault,
        problem=why_no_answer(front),
        story=story_of(front, chosen=chosen, allowed_drop=flat.get("max_drop_after_ssvd")),
        faults=[c for c in front.candidates if c.state in ("failed", "pruned")],
        trials=front.candidates,
        params=param_names(front.candidates),
        on_front={point.number for point in data.front},
        layers=details.layers,
        total=total_row(details.layers),
        times=times,
        settings=flat,
        versions=package_versions(),
        tables=[name for name, frame in frames.items() if len(frame)],
        now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
    )
    plot = environment.get_template("front.html.j2").render(**common, drawn=drawn)
    table, *more_tables = write_frames(folder, frames)
    files = ReportFiles(
        page=folder / "report.html",
        plot=folder / "front.html",
        picture=folder / "front.png",
        table=table,
        more_tables=tuple(more_tables),
    )
    draw_static(data, files.picture)
    write_text_atomically(files.plot, plot)
    # Last, as it speaks of the others.
    write_text_atomically(files.page, page)
    return files


def _environment(data: ParetoData) -> Environment:
    environment = Environment(
        loader=PackageLoader("compress_search.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    standing = {point.number: point.status for point in data.points}
    filters: dict[str, Callable[..., object]] = {
        "ratio": ratio,
        "count": count,
        "duration": duration,
        "accuracy": data.scale.accuracy,
        "drop": data.scale.drop,
        "param": format_param,
        "standing": lambda trial: standing.get(trial.number, trial.state),
        "stage_label": stage_label,
    }
    environment.filters |= filters
    environment.globals["plotly"] = Markup(get_plotlyjs())
    return environment


def _drawn(figure: StudyFigure) -> Markup:
    """A figure's data once, and its layout for wide and narrow, light and dark pages, as JSON."""
    places = {place: figure.draw(narrow=place == "narrow") for place in ("wide", "narrow")}
    layouts = {
        place: {"light": light, "dark": recoloured(light, DARK)}
        for place, drawn in places.items()
        for light in (json.loads(drawn.layout.to_json()),)
    }
    data = json.loads(places["wide"].to_json())["data"]
    # A name that holds "</script>" must not end the element that the JSON stands in.
    return Markup(json.dumps({"data": data, "layouts": layouts}).replace("<", "\\u003c"))


def _code(chosen: Candidate, details: Details) -> dict[str, str]:
    exported = details.export_folder
    if exported is not None and (exported / WEIGHTS_FILE).is_file():
        program = exported / PROGRAM_FILE
        return {
            "plan": loading_code(exported / PLAN_FILE, exported / WEIGHTS_FILE),
            "program": program_loading_code(program) if program.is_file() else "",
        }
    if details.fault is not None:
        return {"plan": "", "program": ""}
    assert chosen.folder is not None
    return {"plan": loading_code(chosen.folder / PLAN, chosen.folder / WEIGHTS), "program": ""}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return flat
