"""The report: one self-contained HTML page, the plot alone, its picture, and the trials as CSV.

Everything from outside (names, reasons, settings) is escaped by jinja2; what is not escaped is made here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from compress_search.reports.answer import answer_facts, summary_of, why_no_answer
from compress_search.reports.figure_look import DARK, LIGHT
from compress_search.reports.figures import StudyFigure, study_figures
from compress_search.reports.formatting import count, duration, ratio
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
from compress_search.reports.trials import candidates_csv, stage_times
from compress_search.results import Candidate, ParetoFront, format_param, param_names
from compress_search.workspace import write_text_atomically


@dataclass(frozen=True)
class ReportFiles:
    """Where the parts of a report lie.

    Attributes:
        page: The whole report, ``report.html``. It needs no other file and no network.
        plot: The interactive figure alone, ``front.html``.
        picture: The figure as a picture, ``front.png``.
        table: The trials, ``candidates.csv``.
    """

    page: Path
    plot: Path
    picture: Path
    table: Path


def write_report(
    folder: Path,
    *,
    title: str,
    front: ParetoFront,
    chosen: Candidate | None,
    test: tuple[float, float] | None = None,
    layers: Sequence[LayerRow] = (),
    settings: Mapping[str, Any] | None = None,
    export_folder: Path | None = None,
) -> ReportFiles:
    """Write a study's report.

    Args:
        folder: Where to; it is created. Each file is replaced whole.
        title: The page's heading.
        front: The study's candidates.
        chosen: The model to ship, if there is one.
        test: Accuracy of the original and of the chosen model on the test data, if measured.
        layers: What became of each layer of the chosen model (``layer_table``), if known.
        settings: How the study was set up. Nested mappings and dataclasses are written as ``outer.inner``.
        export_folder: Where the chosen model was exported to, if it was.

    Returns:
        The files.

    Raises:
        OSError: The folder cannot be written.
    """
    data = pareto_data(front, chosen=chosen)
    figures = study_figures(front, chosen=chosen, layers=layers if chosen is not None else ())
    common = {"title": title, "summary": summary_of(front), "figures": _drawn(figures[0])}
    environment = _environment(data)
    files = ReportFiles(
        *(folder / name for name in ("report.html", "front.html", "front.png", "candidates.csv"))
    )
    versions = package_versions()
    page = environment.get_template("report.html.j2").render(
        **common,
        chosen=chosen,
        answer=[] if chosen is None else answer_facts(chosen, front, scale=data.scale, test=test),
        code=None if chosen is None else _code(chosen, export_folder),
        problem=why_no_answer(front),
        faults=[c for c in front.candidates if c.state in ("failed", "pruned")],
        trials=front.candidates,
        params=param_names(front.candidates),
        on_front={point.number for point in data.front},
        layers=layers if chosen is not None else (),
        total=total_row(layers),
        most_macs=max((max(row.macs_before, row.macs_after) for row in layers), default=1),
        times=stage_times(candidate.stages for candidate in front.candidates),
        settings=_flat(settings or {}),
        versions=versions,
        now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    write_text_atomically(files.page, page)
    write_text_atomically(files.plot, environment.get_template("front.html.j2").render(**common))
    draw_static(data, files.picture)
    write_text_atomically(files.table, candidates_csv(front))
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
    environment.filters |= {
        "ratio": ratio,
        "count": count,
        "duration": duration,
        "accuracy": data.scale.accuracy,
        "drop": data.scale.drop,
        "param": format_param,
        "standing": lambda trial: standing.get(trial.number, trial.state),
    }
    environment.globals["plotly"] = Markup(get_plotlyjs())
    return environment


def _drawn(figure: StudyFigure) -> Markup:
    """A figure's data once, and its layout for wide and narrow, light and dark pages, as JSON."""
    drawn = {
        place: {
            name: json.loads(figure.draw(narrow=place == "narrow", theme=theme).to_json())
            for name, theme in (("light", LIGHT), ("dark", DARK))
        }
        for place in ("wide", "narrow")
    }
    layouts = {
        place: {theme: value["layout"] for theme, value in themes.items()} for place, themes in drawn.items()
    }
    # A name that holds "</script>" must not end the element that the JSON stands in.
    text = json.dumps({"data": drawn["wide"]["light"]["data"], "layouts": layouts}).replace("<", "\\u003c")
    return Markup(text)


def _code(chosen: Candidate, export_folder: Path | None) -> dict[str, str]:
    if export_folder is not None and (export_folder / WEIGHTS_FILE).is_file():
        program = export_folder / PROGRAM_FILE
        return {
            "plan": loading_code(export_folder / PLAN_FILE, export_folder / WEIGHTS_FILE),
            "program": program_loading_code(program) if program.is_file() else "",
        }
    assert chosen.folder is not None
    return {"plan": loading_code(chosen.folder / "plan.json", chosen.weights), "program": ""}


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
