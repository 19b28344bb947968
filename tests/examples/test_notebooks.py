"""Issue 6, must show 5: the notebooks run from top to bottom, here with small settings, each in a process of its own.

A notebook's cells become a script, in order; a cell's last expression is shown as a kernel shows it (`_repr_html_`, else `repr`).
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))
SHOW = "def _show(value):\n    page = getattr(value, '_repr_html_', None)\n    print('SHOWN', page() if page else repr(value))\n"


def script_of(notebook):
    """The code cells in order, each one's last expression shown."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    parts = [SHOW]
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            tree.body[-1].value = ast.Call(ast.Name("_show", ast.Load()), [tree.body[-1].value], [])
        parts.append(ast.unparse(ast.fix_missing_locations(tree)))
    return "\n".join(parts) + "\n", len(cells)


def test_there_are_three_and_they_are_kept_without_outputs():
    assert [one.stem for one in NOTEBOOKS] == ["custom-data-and-metric", "fine-tune-and-compare", "from-scratch"]
    for one in NOTEBOOKS:
        notebook = json.loads(one.read_text())
        assert notebook["nbformat"] == 4
        assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path, tiny_model_folder):
    text, cells = script_of(notebook)
    script = tmp_path / "cells.py"
    script.write_text(text)
    small = {"EXAMPLE_STEPS": "4", "EXAMPLE_MODEL": str(tiny_model_folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(script)],
        cwd=tmp_path,
        env=os.environ | small,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert cells >= 6
    assert "<svg" in done.stdout  # the curve
    assert "finished" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "checkpoints" / "final").is_dir()
