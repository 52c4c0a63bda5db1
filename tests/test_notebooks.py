"""The notebooks: run from top to bottom in a folder of their own, and committed without outputs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytest.importorskip("sklearn", reason="the notebooks need compress-search[studies]")
pytest.importorskip("ipywidgets", reason="the notebooks need compress-search[notebooks]")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_are_committed_without_outputs(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_run_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # Beside the studies and configurations, as in a checkout, but with its results elsewhere.
    for folder in ("studies", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    home = tmp_path / "notebooks"
    home.mkdir()
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(content, timeout=300, resources={"metadata": {"path": str(home)}})
    client.execute()
    nbformat.write(content, tmp_path / notebook.name)
    outputs = [output for cell in content.cells for output in cell.get("outputs", ())]
    # Neither a warning nor a message of the machinery belongs into what a reader sees.
    assert [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"] == []
    assert [o for o in outputs if o.output_type in ("display_data", "execute_result")]
