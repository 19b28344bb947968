"""Issue 6, must show 5: the notebooks run headless from top to bottom, each with no name but its own, here with small
settings.
"""

import asyncio
import json
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))
HELD_OUT = {
    "fine-tune-and-compare": {"LLMTUNE_DATA__EVAL": "[{path: 'example:records/heldout', max_samples: 4}]"},
}
"""For a notebook whose every held-out row is answered, before the training and after it."""
MADE_UP_BYTES = f"""
import sys
sys.path.append({str(Path(__file__).resolve().parents[1])!r})
from training_fixtures import plan_made_up_bytes
plan_made_up_bytes()
"""


class ThisPython(AsyncKernelManager):
    """A kernel of the Python that runs the tests, whatever kernels the machine has registered."""

    @property
    def kernel_spec(self):
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
        )


@pytest.fixture(scope="module")
def kernel(tmp_path_factory, tiny_model_folder):
    """One kernel for all notebooks: the libraries are imported once."""
    small = {"EXAMPLE_STEPS": "4", "EXAMPLE_MODEL": str(tiny_model_folder)}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython"))}
    kernel = ThisPython()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**small, **quiet}.items():
            environment.setenv(name, value)
        yield kernel
    asyncio.run(kernel.shutdown_kernel(now=True))


def executed(path, kernel, folder):
    """Run all cells in `folder`, without the names of an earlier notebook; raises CellExecutionError with the cell and
    its traceback where one fails.
    """
    notebook = nbformat.read(path, as_version=4)
    first = next(place for place, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    # The notebook itself is the first to import anything.
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(f"exec({MADE_UP_BYTES!r}, {{}})"))
    forget = "import os; os.environ.pop('LLMTUNE_DATA__EVAL', None)"
    few_rows = f"os.environ.update({HELD_OUT.get(path.stem, {})})"
    for line in ("%reset -f", few_rows, forget, f"%cd -q {folder}"):  # the folder of the notebook before may be gone
        notebook.cells.insert(0, nbformat.v4.new_code_cell(line))
    client = NotebookClient(notebook, timeout=240, km=kernel)
    client.execute()
    client.kc.stop_channels()  # the kernel lives on, and who talks to it next opens its own
    nbformat.validate(notebook)
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_three_and_they_are_kept_without_outputs():
    assert [one.stem for one in NOTEBOOKS] == ["custom-data-and-metric", "fine-tune-and-compare", "from-scratch"]
    for one in NOTEBOOKS:
        notebook = json.loads(one.read_text())
        assert notebook["nbformat"] == 4
        assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_headless_and_draws_its_progress_and_curve(path, tmp_path, kernel):
    outputs = executed(path, kernel, tmp_path)
    live = [one.data["text/html"] for one in outputs if one.output_type == "display_data" and "text/html" in one.data]
    assert live
    assert "finished, step 4 of 4" in live[-1]  # one output, drawn anew until the end
    assert live[-1].count("<svg") == live[-1].count("</svg>") >= 5
    assert not [
        one.text for one in outputs if one.output_type == "stream" and one.name == "stderr" and "llmtune:" in one.text
    ]
    assert "parameters" in "".join(one.text for one in outputs if one.output_type == "stream" and one.name == "stdout")
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "checkpoints" / "final").is_dir()
