"""What `pip install` of the built wheel gives: presets, pages and example data travel inside, and it trains from
anywhere without the checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a network by the tool that pyproject names."""
    pytest.importorskip("hatchling", reason="hatchling is not installed; it is in the `dev` extra")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder (with a space in its name) into which the wheel was installed, and nothing else."""
    folder = tmp_path_factory.mktemp("installed here") / "site packages"
    command = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
        "--no-compile",
    ]
    subprocess.run(
        [sys.executable, *command, "--target", str(folder), str(wheel)], check=True, capture_output=True, timeout=120
    )
    return folder


@pytest.fixture
def llmtune(installed, tmp_path):
    """Run Python with the installed llmtune, from a working folder of its own."""

    def run(*arguments):
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLMTUNE_"))}
        environ |= {"PYTHONPATH": str(installed), "LLMTUNE_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_presets_pages_and_example_data_travel_inside_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in ("configs", "docs", "example-data"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / name).rglob("*") if path.is_file()}
        assert len(files) >= 5
        assert {f"llmtune/_shipped/{file}" for file in files} <= inside
    templates = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.jinja")}
    assert len(templates) >= 3
    assert templates | {"llmtune/py.typed"} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "src/"))]


def test_the_tables_of_other_toolkits_travel_inside_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    tables = sorted((ROOT / "src/llmtune/config/importers/peers").glob("*.tsv"))
    assert len(tables) == 15
    assert {f"llmtune/config/importers/peers/{table.name}" for table in tables} <= inside


def test_what_is_installed_is_what_is_imported(llmtune, installed):
    code = "import llmtune; from llmtune.config.paths import shipped_path as at; print(llmtune.__file__); print(at('configs/test.yaml'))"  # noqa: E501
    where = llmtune("-c", code)
    assert all(Path(line).is_relative_to(installed) for line in where.splitlines())
    assert len(where.splitlines()) == 2


def test_a_preset_is_found_in_the_wheel_from_another_working_folder(llmtune):
    shown = llmtune("-m", "llmtune", "config", "show", "--config", "production", "--origin")
    (line,) = [line for line in shown.splitlines() if line.startswith("training.batch_size")]
    assert line.split()[1] == "8"
    assert line.endswith("preset production:8")


def test_the_models_are_listed_without_the_checkout(llmtune):
    names = {json.loads(line)["name"] for line in llmtune("-m", "llmtune", "list-models", "--json").splitlines()}
    assert {"smollm2-135m-instruct", "custom-tiny"} <= names


def test_every_page_is_printed_without_the_checkout(llmtune, installed):
    pages = [json.loads(line) for line in llmtune("-m", "llmtune", "docs", "--json").splitlines()]
    assert {page["topic"] for page in pages} == {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert all(Path(page["path"]).is_relative_to(installed) for page in pages)
    assert llmtune("-m", "llmtune", "docs", "promises") == (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")


def test_production_trains_a_users_model_on_a_users_file(llmtune, tiny_model_folder, tmp_path):
    """Must-show 6: a folder and a file of the user's, with spaces in their names, from another working folder."""
    model, data = tmp_path / "my model", tmp_path / "my rows.jsonl"
    model.symlink_to(tiny_model_folder)
    rows = [{"prompt": f"asks {number}", "completion": "words " * (1 + number % 3)} for number in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = ("training.max_steps=2", "training.batch_size=2", "training.gradient_accumulation_steps=1")
    limits += ("evaluation.max_new_tokens=8",)
    out = llmtune(
        "-m",
        "llmtune",
        "train",
        "--offline",
        "--config",
        "production",
        f"model.name={model}",
        f"data.train={data}",
        *limits,
    )
    run = Path(out.splitlines()[-1])
    run = run if run.is_absolute() else tmp_path / run
    assert run.is_relative_to(tmp_path)
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert list((run / "checkpoints" / "final").glob("*.safetensors"))


def test_a_config_file_of_the_users_own_extends_a_shipped_preset(llmtune, tmp_path):
    (tmp_path / "production.yaml").write_text("extends: test\ntraining:\n  batch_size: 3\n")
    shown = llmtune("-m", "llmtune", "config", "show", "--config", "production.yaml")
    assert "batch_size: 3" in shown
    assert "max_samples: 100" in shown
