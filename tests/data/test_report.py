"""`llmtune data report`: sixty faulty rows, sixty reasons; and numbers that can be checked by hand (Q4)."""

import json
import re

import numpy as np
import pytest

from llmtune.data.dataset.make_dataset import raise_problems, survey_data
from llmtune.data.dataset.report import data_report, histogram, padding_share, report_lines, row_line, row_report
from llmtune.errors import DataError

OK = b'{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}'


def row(messages, **fields):
    return json.dumps({"messages": messages, **fields}).encode()


def with_answer(**message):
    return row([{"role": "user", "content": "a"}, message])


A = {"role": "assistant"}
CALLS = {"role": "assistant", "content": ""}
FAULTY = [
    (b"nope", "not JSON: expecting value at character 1"),
    (b"{", "not JSON"),
    (b'{"messages": [' + OK + b"]", "not JSON: expecting ',' delimiter"),
    (b"{'messages': []}", "not JSON: expecting property name enclosed in double quotes"),
    (b'{"messages": [' + OK + b"],}", "not JSON"),
    (b'{"messages": [' + OK + b"]} {}", "not JSON: extra data"),
    (b'{"messages": "a\tb"}', "not JSON: invalid control character"),
    (b'{"messages": "\\x"}', "not JSON: invalid \\escape"),
    (b'{"messages": "\xff"}', "byte 15 of the row (0xff) is not valid UTF-8"),
    (b'{"messages": "\xed\xa0\x80"}', "byte 15 of the row (0xed) is not valid UTF-8"),
    (b'{"messages": "\xc3', "byte 15 of the row (0xc3) is not valid UTF-8"),
    (b'{"messages": [' + OK + b'], "system": NaN}', "system: NaN is not a JSON number"),
    (b'{"messages": [' + OK + b'], "weight": Infinity}', "weight: Infinity is not a JSON number"),
    (b'{"messages": [' + OK + b'], "tools": [{"a": -Infinity}]}', "tools[0].a: -Infinity is not a JSON number"),
    (b'{"messages": [], "messages": []}', "messages: the key stands twice in one object"),
    (b'{"messages": [{"role": "user", "role": "user"}]}', "messages[0].role: the key stands twice in one object"),
    (
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        "messages[0].content: half a surrogate pair (\\ud83d) is not a character",
    ),
    (b'{"messages": [{"role": "user", "content": "a\\udc00b"}]}', "half a surrogate pair (\\udc00)"),
    (b'{"a\\ud800": 1}', "half a surrogate pair (\\ud800)"),
    (b"[" * 100_000, "brackets are nested too deep"),
    (b'{"a": ' + b"9" * 5000 + b"}", "a number has more digits than can be read"),
    (b'["a", "b"]', "a row must be an object, this is a list of 2"),
    (b'"text"', 'a row must be an object, this is the text "text"'),
    (b"3", "a row must be an object, this is the number 3"),
    (b"null", "a row must be an object, this is null"),
    (b"true", "a row must be an object, this is the truth value true"),
    (b"{}", "messages: the field is missing"),
    (b'{"messages": null}', "messages: the field is missing"),
    (row([]), "messages: the list of messages is empty"),
    (row("hello"), 'messages: must be a list of messages, this is the text "hello"'),
    (row({"role": "user"}), "messages: must be a list of messages, this is an object with `role`"),
    (row(["hello"]), 'messages[0]: a message must be an object, this is the text "hello"'),
    (row([None]), "messages[0]: a message must be an object, this is null"),
    (row([{"content": "a"}]), "messages[0].role: the message has no role"),
    (row([{"role": 1, "content": "a"}]), "messages[0].role: must be text, this is the number 1"),
    (with_answer(role="assistent", content="a"), 'messages[1].role: unknown role "assistent"'),
    (with_answer(role="Narrator", content="a"), 'messages[1].role: unknown role "Narrator"'),
    (with_answer(role="gpt-4", content="a"), 'messages[1].role: unknown role "gpt-4"'),
    (with_answer(role="", content="a"), 'messages[1].role: unknown role ""'),
    (with_answer(**A), "messages[1].content: is missing"),
    (with_answer(**A, content=None), "messages[1].content: is null"),
    (with_answer(**A, content=3), "messages[1].content: must be text, this is the number 3"),
    (with_answer(**A, content=True), "messages[1].content: must be text, this is the truth value true"),
    (with_answer(**A, content={"text": "a"}), "messages[1].content: must be text, this is an object with `text`"),
    (with_answer(**A, content=[3]), "messages[1].content[0]: must be a part with text, this is the number 3"),
    (with_answer(**A, content=[{"type": "text", "text": 3}]), "messages[1].content[0].text: must be text"),
    (
        with_answer(**A, content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        'a part of type "image_url" is not text',
    ),
    (with_answer(**A, content=""), "messages[1].content: the answer is empty"),
    (with_answer(**A, content=" \n"), "messages[1].content: the answer is empty"),
    (row([{"role": "user", "content": "a"}]), "messages: no message is from the assistant"),
    (
        row([{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]),
        "messages: no message is from the assistant",
    ),
    (with_answer(**A, content="a", weight=-1), "messages[1].weight: -1 is not a weight"),
    (with_answer(**A, content="a", weight="1"), 'messages[1].weight: must be a number, this is the text "1"'),
    (with_answer(**A, content="a", weight=1e300), "messages[1].weight: 1e+300 is not a weight"),
    (with_answer(**CALLS, tool_calls={"name": "f"}), "messages[1].tool_calls: must be a list of calls"),
    (with_answer(**CALLS, tool_calls=[{"function": {}}]), "messages[1].tool_calls[0]: the call names no function"),
    (
        with_answer(**CALLS, tool_calls=[{"function": {"name": "f", "arguments": 3}}]),
        "messages[1].tool_calls[0].function.arguments: must be an object",
    ),
    (
        row([{"role": "user", "content": "a"}, {**A, "content": "b"}], tools="nope"),
        'tools: is not JSON: the text "nope"',
    ),
    (
        row([{"role": "user", "content": "a"}, {**A, "content": "b"}], tools=[3]),
        "tools: must be a list of tool descriptions",
    ),
    (json.dumps({"instruction": "a", "output": "b"}).encode(), "the row looks like alpaca, the others are messages"),
]


def test_sixty_faulty_rows_give_sixty_named_reasons_with_their_lines(write, config, renderer):
    """Each stands between good rows, all are found in one pass, the balance adds up, and training is refused with exit
    code 3.
    """
    assert len(FAULTY) == 60
    good = row([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    path = write("a.jsonl", [line for faulty, _ in FAULTY for line in (good, faulty)])
    prepared = survey_data(config(path), renderer)
    entries = {
        int(entry["source"].rpartition(":")[2]): entry for entry in prepared.ledger.entries if entry["fate"] == "bad"
    }
    for index, (_, reason) in enumerate(FAULTY):
        entry = entries.pop(2 * index + 2)
        problem = f"{entry['field']}: {entry['reason']}" if "field" in entry else entry["reason"]
        assert reason in problem
        assert entry["fix"]
    assert entries == {}
    summary = prepared.ledger.summary()["train"]
    assert (summary["input"], summary["used"], summary["bad"]) == (120, 60, 60)
    with pytest.raises(DataError) as caught:
        raise_problems(prepared)
    assert caught.value.exit_code == 3
    assert [problem.where for problem in caught.value.problems] == [f"{path}:{2 * index + 2}" for index in range(60)]
    assert str(caught.value).isprintable() or "\n" in str(caught.value)


def test_the_report_counts_what_is_there(write, config, renderer):
    path = write("a.jsonl", [{"text": "x" * size} for size in (10, 10, 20, 90)] + [b"nope"])
    given = config(path, max_length=64, overlong="truncate_right", on_bad_row="skip", packing="best_fit")
    prepared = survey_data(given, renderer)
    report = data_report(prepared, given, batch_size=2)
    lengths = prepared.train.lengths.tolist()
    assert (report["lengths"]["shortest"], report["lengths"]["longest"], report["lengths"]["examples"]) == (
        min(lengths),
        64,
        4,
    )
    assert sum(bin_["examples"] for bin_ in report["lengths"]["histogram"]) == 4
    assert report["sources"][0] | {"tokens": 0} == {
        "part": "train",
        "source": str(path),
        "name": "a",
        "input": 5,
        "used": 3,
        "cut": 1,
        "dropped": 0,
        "duplicate": 0,
        "held_out": 0,
        "bad": 1,
        "tokens": 0,
        "loss_tokens": float(sum(length - 1 for length in lengths)),
    }
    packed = report["packing"]["strategies"]["best_fit"]
    assert packed["efficiency"] == sum(lengths) / (64 * packed["sequences"])
    assert json.loads(json.dumps(report)) == report
    text = "\n".join(report_lines(report))
    assert "train: 5 input rows = 3 used + 1 cut + 0 dropped + 0 duplicate + 0 held out + 1 bad" in text
    lost = next(entry["tokens_lost"] for entry in report["rows"] if entry["fate"] == "cut")
    assert f"{lost:,} tokens lost to cutting" in text
    assert re.search(r"packing best_fit: \d sequences, .* full \(chosen\)", text)


def test_the_fate_of_one_row_is_found_by_its_place(write, config, renderer):
    path = write("a.jsonl", [{"text": "x" * 100}, b"nope"])
    prepared = survey_data(config(path, max_length=64, overlong="split", on_bad_row="skip"), renderer)
    for name in (f"{path}:1", "a.jsonl:1"):
        (entry,) = row_report(prepared, name)
        assert entry["fate"] == "cut"
        assert len(entry["examples"]) == 2
    assert row_line(row_report(prepared, "a.jsonl:2")[0]).startswith(f"{path}:2: bad: not JSON")
    for name in ("a.jsonl:3", "a.jsonl[1]", "other.jsonl:1", "nonsense", ""):
        with pytest.raises(DataError, match="there is no row"):
            row_report(prepared, name)


def test_padding_share_is_the_part_of_positions_without_a_token():
    lengths = np.array([4, 2, 1, 1])
    assert padding_share(lengths, 2, None) == 1 - 8 / 10
    assert padding_share(lengths, 1, 3) == 0
    assert padding_share(lengths[:0], 2, None) == 0


def test_histogram_bins_have_one_round_width_and_add_up():
    lengths = np.array([1, 130, 131, 1199])
    bins = histogram(lengths)
    assert {interval["to"] - interval["from"] + 1 for interval in bins} == {100}
    assert sum(interval["examples"] for interval in bins) == 4
    assert bins[1]["examples"] == 2
