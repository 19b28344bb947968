"""`llmtune doctor` works on the device, and names the fix for what fails."""

import json
import sysconfig

import pytest
from pretend import numbers

from llmtune.cli import doctor_gpu
from llmtune.cli.main import run

FINE = {"cuda:0", "product", "attention", "4-bit on cuda", "page-locked"}


def report(capsys):
    code = run(["doctor", "--json"])
    return code, {one["what"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}


@pytest.mark.parametrize(
    ("card", "limit", "failing"),
    [("rtx4090", 2**63, set()), ("t4", 1 << 20, {"attention", "page-locked"})],
)
def test_each_kind_of_work_is_tried(card, limit, failing, capsys):
    with numbers.machine(card, limit):
        code, found = report(capsys)
    assert code == 0
    assert {what for what in FINE if found[what]["state"] != "ok"} == failing
    assert all(found[what]["fix"] for what in failing)


def test_liger_is_tried_and_its_absence_has_a_command(capsys, monkeypatch):
    for is_installed, state in ((True, "ok"), (False, "warn")):
        monkeypatch.setattr(doctor_gpu, "is_installed", lambda answer=is_installed: answer)
        with numbers.machine():
            _, found = report(capsys)
        assert found["liger"]["state"] == state
    assert "llmtune[gpu]" in found["liger"]["fix"]


def test_a_card_without_code_is_bad(capsys):
    with numbers.machine("v100"):
        code, found = report(capsys)
    assert code == 6
    assert "sm_70" in found["cuda"]["found"]
    assert found["cuda"]["fix"]


TRITON = {
    "as it should be": (("gcc",), {}, True, "ok", "gcc compiles Python.h"),
    "clang alone": (("clang",), {}, True, "ok", "clang compiles Python.h"),
    "a compiler named in CC": (("mycc",), {"CC": "mycc"}, True, "ok", "mycc compiles Python.h"),
    "no compiler": ((), {}, True, "warn", "missing: a C compiler"),
    "cc, which Triton does not call": (("cc",), {}, True, "warn", "missing: a C compiler"),
    "a CC that is no program": (("gcc",), {"CC": "nvcc-99"}, True, "warn", "missing: CC=nvcc-99"),
    "no Python.h": (("gcc",), {}, False, "warn", "include/Python.h"),
    "neither": ((), {}, False, "warn", "missing: a C compiler, "),
    "a compiler that does not work": (("gcc",), {"BROKEN": "1"}, True, "warn", "fatal error: stddef.h: No such file"),
}
COMPILER = """#!/bin/sh
echo "note: ${BROKEN:+1 }line" >&2
[ -z "$BROKEN" ] || { echo "x.c:1: fatal error: stddef.h: No such file" >&2; exit 1; }
case "$*" in *"-I$HEADERS"*) read -r line; [ "$line" = "#include <Python.h>" ];; *) exit 1;; esac
"""


@pytest.mark.parametrize(("programs", "variables", "headers", "state", "says"), TRITON.values(), ids=TRITON)
def test_what_triton_compiles_with_is_tried_and_named_with_its_fix(
    programs, variables, headers, state, says, tmp_path, monkeypatch, capsys
):
    """A machine without a C compiler, or without Python's headers, trains without Liger's kernels and flex attention.

    The compiler is found as Triton finds it (`triton/runtime/build.py`): CC, gcc, clang.
    """
    (tmp_path / "include").mkdir()
    if headers:
        (tmp_path / "include" / "Python.h").touch()
    for name in programs:
        (tmp_path / name).write_text(COMPILER)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_paths", lambda _scheme: {"include": str(tmp_path / "include")})
    for name, value in {"PATH": str(tmp_path), "HEADERS": str(tmp_path / "include"), **variables}.items():
        monkeypatch.setenv(name, value)
    if "CC" not in variables:
        monkeypatch.delenv("CC", raising=False)
    with numbers.machine():
        code, found = report(capsys)
    assert (code, found["triton"]["state"]) == (0, state)
    assert says in found["triton"]["found"]
    assert ("python3-dev" in found["triton"]["fix"]) == (state == "warn")
