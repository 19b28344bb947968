"""`llmtune doctor` works on the device, and names the fix for what fails."""

import json

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
