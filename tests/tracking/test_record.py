"""metrics.jsonl: complete, and after a resume byte for byte the file of the run never stopped."""

import json

from llmtune.tracking import RunRecord


def write(record, steps):
    for step in steps:
        record.log(step, {"train_mean_nll": 1.0 / step})
        if step % 2 == 0:
            record.log(step, {"eval_mean_nll": 2.0 / step})
            record.samples(step, [{"prompt": "p", "text": f"answer {step}"}])


def test_a_resumed_record_is_byte_for_byte_the_one_never_stopped(tmp_path):
    """P2: lines written after the checkpoint are dropped at resume and written again."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = RunRecord(tmp_path / "whole")
    write(whole, range(1, 9))
    whole.close()
    first = RunRecord(tmp_path / "stopped")
    write(first, range(1, 5))
    position = first.position()
    write(first, range(5, 8))
    with (tmp_path / "stopped" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "train_me')  # the kill
    again = RunRecord(tmp_path / "stopped")
    assert again.rewind(position) == 3 + 1 + 1
    write(again, range(5, 9))
    again.close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_line_is_strict_json_even_when_a_loss_is_not_a_number(tmp_path):
    record = RunRecord(tmp_path)
    record.log(1, {"train_mean_nll": float("nan")})
    record.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest_fail(name))["step"] == 1


def pytest_fail(name):
    raise AssertionError(f"{name} is not JSON")
