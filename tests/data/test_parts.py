"""Rows tokenized in parts are the rows tokenized at once, byte for byte, and a training finds them."""

import pytest

from llmtune.cli.main import run as command
from llmtune.data.dataset import parts
from llmtune.data.dataset.make_dataset import prepare_data, prepare_part
from llmtune.data.dataset.parts import Part
from llmtune.data.rows.preferences import RECOGNIZED_BY


def chat(question, answer="yes"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [*(chat(f"q{index}", "answer " * (3 * index % 11) + "x") for index in range(17)), b"nope", chat("", "y")]


def stored(folder):
    """The bytes of every file of the one set in a cache folder, but its manifest, which has a time."""
    (found,) = (folder / "rows").iterdir()
    return {file.name: file.read_bytes() for file in found.iterdir() if file.suffix in (".i32", ".table", ".json")}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"max_samples": 8}, {"overlong": "split", "max_length": 40}])
def test_parts_are_joined_to_the_undivided_set_byte_for_byte(
    write, config, renderer, tmp_path, monkeypatch, count, options
):
    monkeypatch.setattr(parts, "BLOCK_ROWS", 2)
    rows = write("rows.jsonl", ROWS)
    whole = config(rows, cache_dir=str(tmp_path / "whole"), on_bad_row="skip", **options)
    prepare_data(whole, renderer)
    shared = config(rows, cache_dir=str(tmp_path / "shared"), on_bad_row="skip", **options)
    done = [prepare_part(shared, renderer, Part(number, count)) for number in range(count, 0, -1)]
    assert done == [list(range(1, number)) for number in range(count, 0, -1)]
    assert len(stored(tmp_path / "shared")) >= 4
    about = {name: data for name, data in stored(tmp_path / "shared").items() if name != "manifest.json"}
    assert about == {name: data for name, data in stored(tmp_path / "whole").items() if name != "manifest.json"}
    assert not list((tmp_path / "shared" / "parts").iterdir())
    found = prepare_data(shared, renderer).decisions
    assert any("tokenized before" in decision.reason for decision in found if decision.key == "data.cache_dir")


JUDGED = {
    "classification": [{"text": "word " * (index % 5 + 1), "label": "abc"[index % 3]} for index in range(12)],
    "reward": [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad", "margin": i / 8} for i in range(12)],
}


@pytest.mark.parametrize("method", JUDGED)
def test_labels_and_margins_are_joined_too(write, config, renderer, tmp_path, monkeypatch, method):
    monkeypatch.setattr(parts, "BLOCK_ROWS", 2)
    rows, formats = write("rows.jsonl", JUDGED[method]), RECOGNIZED_BY[method]
    whole, shared = (config(rows, cache_dir=str(tmp_path / name)) for name in ("whole", "shared"))
    data = prepare_data(whole, renderer, formats=formats).train
    assert {"abc"[index] for index in range(3)} == {*data.labels} or data.margins.max() == 11 / 8
    for number in (2, 1):
        prepare_part(shared, renderer, Part(number, 2), formats=formats)
    about = [{**stored(tmp_path / name), "manifest.json": b""} for name in ("whole", "shared")]
    assert about[0] == about[1]


def test_a_part_tokenizes_its_rows_alone_and_once(write, config, renderer, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK_ROWS", 2)
    given, counted = config(write("rows.jsonl", ROWS), on_bad_row="skip"), []
    for number in (1, 3, 1, 2):
        seen = [0]
        prepare_part(given, renderer, Part(number, 3), progress=lambda done, *_, seen=seen: seen.append(done))
        counted.append(seen[-1])
    assert counted == [7, 6, 0, 6]  # 19 rows in blocks of two; the first part was there the second time


def test_the_command_names_what_is_missing(tiny_model_folder, write, tmp_path, capsys):
    given = [f"model.name={tiny_model_folder}", f"data.train={write('rows.jsonl', ROWS[:9])}"]
    given += [f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=1"]
    assert command(["data", "prepare", *given, "--part", "2/2"]) == 0
    assert capsys.readouterr().out == "part 2 of 2 is tokenized; missing: 1\n"
    assert command(["data", "prepare", *given, "--part", "1/2"]) == 0
    assert capsys.readouterr().out == "all rows are tokenized: a training with this config finds them\n"
    for part in ("0/2", "3/2", "1", "a/b"):
        assert command(["data", "prepare", *given, "--part", part]) == 2
        assert "give K/N" in capsys.readouterr().err
