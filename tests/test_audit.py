"""`scripts/audit` names what is not as it was tested."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def audit(tmp_path):
    """Run a copy of the script beside changed copies of what it reads; gives exit code and findings."""

    def run(file=None, old="", new=""):
        for name in ("scripts/audit", "scripts/constraints.txt", "pyproject.toml"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
        if file is not None:
            text = (ROOT / file).read_text()
            assert old in text
            (tmp_path / file).write_text(text.replace(old, new))
        done = subprocess.run([sys.executable, tmp_path / "scripts" / "audit"], capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("scripts/constraints.txt", "Jinja2==3.1.6\n", "Jinja2==3.1.5\n", "3.1.5 was tested"),
        ("scripts/constraints.txt", "rich==", "poor==", "rich"),
        ("scripts/constraints.txt", "safetensors==0", "safetensors==9", "safetensors"),
        ("pyproject.toml", '"jinja2>=3.1.6"', '"jinja2>=3.1.5"', "jinja2: 3.1.6 is promised, pyproject.toml asks for 3.1.5"),
        ("pyproject.toml", '"peft>=0.20"', '"peft"', "peft: 0.20 is promised, pyproject.toml asks for any"),
        ("pyproject.toml", '"gguf>=0.17"', '"gguf @ https://host.invalid/gguf.whl"', "gguf: comes from an address"),
    ],
)
def test_what_is_not_as_it_was_tested_is_named(audit, file, old, new, says):
    before = audit()[1]
    code, found = audit(file, old, new)
    assert code == 1
    assert says in found
    assert says not in before


def test_the_tested_versions_are_in_reach_of_what_is_declared(audit):
    assert "was tested, and pyproject.toml asks for" not in audit()[1]
