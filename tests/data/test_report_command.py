"""`llmtune data report` end to end: numbers on stdout, talk on stderr, exit code 3 where training would refuse (Q4,
Q8).
"""

import json

import pytest

from llmtune.cli.main import main


def chat(question, answer="yes"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def report(tmp_path, tiny_model_folder, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text(f"model:\n  name: {tiny_model_folder}\ndata:\n  train: [a.jsonl]\n")
    monkeypatch.chdir(tmp_path)

    def report(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["data", "report", "--config", "c.yaml", *arguments])
        out = capsys.readouterr()
        return ended.value.code, out.out, out.err

    return report


def test_the_report_says_the_balance_and_refuses_bad_rows_with_exit_3(write, report):
    write("a.jsonl", [chat("a"), b"nope"])
    code, out, err = report()
    assert code == 3
    assert out.startswith("train: 2 input rows = 1 used + 0 cut + 0 dropped + 0 duplicate + 0 held out + 1 bad\n")
    assert "not JSON" in err
    assert "a.jsonl:2" in err
    assert "Traceback" not in err
    assert report("data.on_bad_row=skip")[0] == 0


def test_json_is_one_object_with_every_number(write, report):
    write("a.jsonl", [chat("a"), chat("b")])
    code, out, _ = report("--json")
    assert code == 0
    assert json.loads(out)["balance"]["train"]["used"] == 2


def test_one_row_can_be_asked_for(write, report):
    write("a.jsonl", [chat("a"), chat("b", 3)])
    assert report("--row", "a.jsonl:1")[:2] == (0, "a.jsonl:1: used\n  example 1: 17 tokens, 4 trained (by weight)\n")
    code, out, _ = report("--row", "a.jsonl:2")
    assert (code, out.splitlines()[0]) == (0, "a.jsonl:2: bad: messages[1].content: must be text, this is the number 3")
    code, _, err = report("--row", "a.jsonl:9")
    assert code == 3
    assert "there is no row 'a.jsonl:9'" in err
