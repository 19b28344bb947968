"""`scripts/audit` names what is not as it was tested."""

import contextlib
import io
import re
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def audit(tmp_path):
    """Run a copy of the script beside changed copies of what it reads; gives exit code and findings."""

    def run(file=None, old="", new=""):
        for name in ("scripts/audit", "scripts/constraints.txt", "scripts/lock.txt", "pyproject.toml"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
        if file is not None:
            text = (ROOT / file).read_text()
            changed = re.sub(old[3:], new, text, flags=re.DOTALL) if old.startswith("re:") else text.replace(old, new)
            assert changed != text
            (tmp_path / file).write_text(changed)
        with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(io.StringIO()) as said:
            runpy.run_path(str(tmp_path / "scripts" / "audit"), run_name="__main__")
        return int(ended.value.code), said.getvalue()

    return run


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("scripts/constraints.txt", "Jinja2==3.1.6\n", "Jinja2==3.1.5\n", "3.1.5 was tested"),
        ("scripts/constraints.txt", "rich==", "poor==", "rich"),
        ("scripts/constraints.txt", "safetensors==0", "safetensors==9", "safetensors"),
        (
            "pyproject.toml",
            '"jinja2>=3.1.6"',
            '"jinja2>=3.1.5"',
            "jinja2: 3.1.6 is promised, pyproject.toml asks for 3.1.5",
        ),
        ("pyproject.toml", '"peft>=0.20"', '"peft"', "peft: 0.20 is promised, pyproject.toml asks for any"),
        ("pyproject.toml", '"gguf>=0.17"', '"gguf @ https://host.invalid/gguf.whl"', "gguf: comes from an address"),
        (
            "pyproject.toml",
            '"rich>=13.9"',
            '"rich>=13.9", "poorer>=1"',
            "poorer: declared in pyproject.toml, and not in scripts/lock.txt",
        ),
        ("pyproject.toml", '"typer>=0.20"', '"typer>=99"', "is locked, and pyproject.toml asks for >=99"),
        (
            "scripts/lock.txt",
            "re:\nrich==.*?\n(?=\\w)",
            "\n",
            "rich: declared in pyproject.toml, and not in scripts/lock.txt",
        ),
        ("scripts/lock.txt", "re:\nsympy==.*?\n(?=\\w)", "\n", "sympy: tested, and not in scripts/lock.txt"),
        ("scripts/lock.txt", "re:\nrich==[0-9.]+", "\nrich==13.9.9", "rich: 13.9.9 is locked, and 15.0.0 was tested"),
        ("scripts/lock.txt", "re:\njinja2==[0-9.]+", "\njinja2==3.1.5", "jinja2: 3.1.5 is locked, 3.1.6 is promised"),
        (
            "scripts/lock.txt",
            "re:(\nrich==[0-9.]+).*?\n(?=\\w)",
            "\\1\n",
            "rich: scripts/lock.txt must have sha256 hashes for it",
        ),
        (
            "scripts/lock.txt",
            "re:(\nrich==.*?)sha256:\\w+",
            "\\1sha256:abc",
            "rich: scripts/lock.txt must have sha256 hashes for it",
        ),
        (
            "scripts/lock.txt",
            "re:(\nrich==.*?)sha256:",
            "\\1md5:",
            "rich: scripts/lock.txt must have sha256 hashes for it",
        ),
        (
            "scripts/lock.txt",
            "re:\nrich==[0-9.]+",
            "\nrich @ https://host.invalid/rich.whl",
            "is not NAME==VERSION with hashes",
        ),
        ("scripts/lock.txt", "re:\nrich==[0-9.]+", "\nrich>=15", "`rich>=15` is not NAME==VERSION with hashes"),
        (
            "scripts/lock.txt",
            "re:\nrich==",
            "\n--index-url https://host.invalid/simple\nrich==",
            "`--index-url https://host",
        ),
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


def test_the_lock_file_holds_every_declared_package_at_its_tested_version_with_hashes_and_no_address(audit):
    assert "lock" not in audit()[1]
    assert "://" not in (ROOT / "scripts" / "lock.txt").read_text()
