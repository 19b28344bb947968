"""Every row has exactly one fate, by number and with its reason, whatever is in the files and however many processes
read them (Q4, P3).
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from example_list import ExampleList
from llmtune.config.schema import SourceConfig
from llmtune.data.dataset import workers
from llmtune.data.dataset.make_dataset import iter_texts, prepare_data, survey_data
from llmtune.data.rendering.renderer import Renderer
from llmtune.errors import ConfigError, DataError

FATES = ("used", "cut", "dropped", "duplicate", "held_out", "bad")


def chat(question, answer="yes", **extra):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]}


def balance(prepared, part="train"):
    summary = prepared.ledger.summary()[part]
    assert summary["input"] == sum(summary[fate] for fate in FATES)
    return {fate: summary[fate] for fate in FATES if summary[fate]}


def fates(prepared):
    return {
        entry["source"].rpartition("/")[2]: (entry["fate"], entry.get("reason")) for entry in prepared.ledger.entries
    }


def test_examples_are_what_the_renderer_makes_of_each_row_in_order(write, config, renderer):
    path = write("a.jsonl", [chat(f"q{index}") for index in range(5)])
    prepared = prepare_data(config(path), renderer)
    assert balance(prepared) == {"used": 5}
    assert list(prepared.ledger.entries) == []
    assert [prepared.train[index].source for index in range(5)] == [f"{path}:{line}" for line in range(1, 6)]
    from llmtune.data.example import Row
    from llmtune.data.rows.formats import conversation_of

    expected = renderer.render(conversation_of(Row(f"{path}:3", chat("q2")), "messages"))
    assert prepared.train[2].input_ids.tolist() == expected.input_ids
    assert prepared.train[2].weights.tolist() == expected.weights
    assert prepared.train[2].input_ids.dtype == np.int32
    assert prepared.train[2].weights.dtype == np.float32
    examples = list(prepared.train)
    assert prepared.train.digest == ExampleList(examples).digest
    assert prepared.train.lengths.tolist() == ExampleList(examples).lengths.tolist()
    assert prepared.train.loss_weights.tolist() == ExampleList(examples).loss_weights.tolist()


def test_each_row_has_one_fate_and_its_reason(write, config, renderer):
    rows = [
        chat("a"),
        b'{"messages": [}',
        chat("b", weight=0),
        chat("a"),
        chat("long", "x" * 400),
        {"messages": [{"role": "user", "content": "a"}]},
        chat("c", " "),
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "c"},
            ]
        },
        chat("<|im_end|>\n<|im_start|>system"),
    ]
    given = config(write("a.jsonl", rows), on_bad_row="skip", overlong="truncate_right", on_duplicate="drop")
    prepared = prepare_data(given, renderer)
    assert balance(prepared) == {"used": 3, "cut": 1, "dropped": 1, "duplicate": 1, "bad": 3}
    statuses = fates(prepared)
    assert statuses.pop("a.jsonl:2")[1].startswith("not JSON")
    assert statuses == {
        "a.jsonl:3": ("dropped", "the row has no trained token"),
        "a.jsonl:4": ("duplicate", "its tokens and weights repeat an earlier row"),
        "a.jsonl:5": ("cut", "longer than `data.max_length` of 256 tokens: truncate_right"),
        "a.jsonl:6": ("bad", "no message is from the assistant, so nothing would be trained"),
        "a.jsonl:7": ("bad", "the answer is empty"),
        "a.jsonl:8": ("used", None),
        "a.jsonl:9": ("used", None),
    }
    summary = prepared.ledger.summary()["train"]
    assert summary["notes"] == {"turns-in-a-row": 1, "control-string": 1}
    assert (
        summary["tokens_cut"]
        == next(entry["tokens_lost"] for entry in prepared.ledger.entries if entry["fate"] == "cut")
        > 0
    )
    lost = {
        int(entry["source"].rpartition(":")[2]): (entry["tokens"], entry["tokens_lost"])
        for entry in prepared.ledger.entries
    }
    assert lost[3][0] == lost[3][1] > 0, "a dropped row loses all its tokens"
    assert lost[4][0] == lost[4][1] > 0, "and so does a duplicate"
    assert lost[5] == (lost[5][0], lost[5][0] - 256)
    assert lost[8] == (lost[8][0], 0)
    assert len(prepared.train) == 4
    json.dumps(summary)


def test_all_problems_of_both_sides_are_said_at_once_with_their_lines(write, config, renderer):
    train = write("a.jsonl", [chat("a"), b"nope", chat("b", "x" * 400)])
    held_out = write("b.jsonl", [chat("c"), chat("d", 3)])
    with pytest.raises(DataError) as caught:
        prepare_data(config(train, eval=[held_out]), renderer)
    assert caught.value.exit_code == 3
    problems = [str(problem) for problem in caught.value.problems]
    assert len(problems) == 3
    assert problems[0].startswith(f"{train}:2: not JSON")
    assert problems[1].startswith(f"{train}:3: ")
    assert "tokens, longer than `data.max_length` of 256 tokens" in problems[1]
    assert problems[2].startswith(f"{held_out}:2: messages[1].content: must be text, this is the number 3")


def test_an_error_names_a_hundred_rows_and_counts_the_others(write, config, renderer):
    path = write("a.jsonl", [chat("a")] + [b"nope"] * 140)
    with pytest.raises(DataError) as caught:
        prepare_data(config(path), renderer)
    assert len(caught.value.problems) == 101
    assert caught.value.problems[-1].problem == "and 40 more rows"


def test_a_file_that_breaks_off_stops_the_run_even_where_bad_rows_are_skipped(write, config, renderer, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([chat("a"), chat("b")])[:-30])
    with pytest.raises(DataError, match=r"a\.json\[.\]: the file ends"):
        prepare_data(config(path, on_bad_row="skip"), renderer)


@pytest.mark.parametrize("policy", ["drop", "truncate_right", "truncate_left", "split"])
def test_no_example_is_longer_than_max_length(write, config, renderer, policy):
    rows = [chat("q" * (7 * index % 90), "word " * (index % 60) + "end") for index in range(80)]
    prepared = prepare_data(config(write("a.jsonl", rows), max_length=64, overlong=policy), renderer)
    assert prepared.train.lengths.max() <= 64
    assert sum(balance(prepared).values()) == 80
    ends = renderer.stop_token_ids
    for example in prepared.train:
        trained = np.flatnonzero(example.weights)
        if policy in ("drop", "truncate_right"):
            assert int(example.input_ids[trained[-1]]) in ends, "a cut answer keeps its end token"


def test_pieces_of_a_split_row_are_numbered(write, config, renderer):
    path = write("a.jsonl", [{"text": "one"}, {"text": "x" * 100}, {"text": "two"}])
    prepared = prepare_data(config(path, max_length=40, overlong="split"), renderer)
    assert [example.source.rpartition("/")[2] for example in prepared.train] == [
        "a.jsonl:1",
        "a.jsonl:2#1",
        "a.jsonl:2#2",
        "a.jsonl:2#3",
        "a.jsonl:3",
    ]
    assert balance(prepared) == {"used": 2, "cut": 1}


def test_short_text_rows_are_dropped_and_counted(write, config, renderer):
    path = write("a.jsonl", [{"text": "x" * size} for size in (1, 5, 50)])
    prepared = prepare_data(config(path, min_length=6), renderer)
    assert fates(prepared)["a.jsonl:1"] == ("dropped", "shorter than `data.min_length` of 6 tokens")


def test_the_weight_of_a_source_scales_its_trained_tokens(write, config, renderer):
    rows = [chat("a")]
    full, half = write("a.jsonl", rows), write("b.jsonl", [chat("b")])
    prepared = prepare_data(config(full, SourceConfig(str(half), weight=0.25)), renderer)
    assert prepared.train.loss_weights.tolist() == [4.0, 1.0]
    assert set(prepared.train[1].weights.tolist()) == {0.0, 0.25}


# --- duplicates, overlap, held out
# ------------------------------------------------------------------------------------------------


def test_a_kept_duplicate_is_used_and_noted(write, config, renderer):
    prepared = prepare_data(config(write("a.jsonl", [chat("a"), chat("b"), chat("a"), chat("a")])), renderer)
    assert balance(prepared) == {"used": 4}
    assert prepared.ledger.summary()["train"]["notes"] == {"duplicate": 2}


def test_the_same_tokens_with_other_weights_are_no_duplicate_but_are_overlap(write, config, renderer):
    path, other = write("a.jsonl", [chat("a"), chat("a", weight=0), chat("b")]), write("b.jsonl", [chat("a")])
    prepared = prepare_data(config(path, SourceConfig(str(other), weight=0.5), on_duplicate="drop"), renderer)
    assert balance(prepared) == {"used": 3, "dropped": 1}
    prepared = prepare_data(config(path, eval=[SourceConfig(str(other), weight=0.5)]), renderer)
    assert fates(prepared)["a.jsonl:1"] == ("dropped", "it also stands in the held-out rows")
    assert balance(prepared, "eval") == {"used": 1}


def test_overlap_is_found_behind_a_cut(write, config, renderer):
    long = chat("a", "x" * 400)
    path, other = write("a.jsonl", [long, chat("b")]), write("b.jsonl", [chat("c"), long])
    for policy, expected in (("drop", {"used": 1, "dropped": 1}), ("keep", {"used": 1, "cut": 1})):
        prepared = prepare_data(config(path, eval=[other], overlong="truncate_right", on_overlap=policy), renderer)
        assert balance(prepared) == expected
    with pytest.raises(DataError) as caught:
        prepare_data(config(path, eval=[other], overlong="truncate_right", on_overlap="error"), renderer)
    assert caught.value.problems[0].where == f"{path}:1"
    assert f"{other}:2" in caught.value.problems[0].fix


def test_held_out_rows_leave_the_training_rows_and_take_their_duplicates_along(write, config, renderer):
    rows = [chat(f"q{index}") for index in range(20)]
    path = write("a.jsonl", rows + rows)
    prepared = prepare_data(config(path, test_size=6), renderer)
    held_out = {bytes(example.input_ids) for example in prepared.eval}
    assert len(prepared.eval) == balance(prepared)["held_out"] == 6
    assert not {bytes(example.input_ids) for example in prepared.train} & held_out
    assert balance(prepared)["dropped"] == 2 * len(held_out) - 6


@pytest.mark.parametrize(("test_size", "count"), [(1, 1), (3, 3), (0.25, 5), (0.01, 1), (0.3, 6)])
def test_test_size_is_rows_or_a_fraction_and_the_seed_chooses(write, config, renderer, test_size, count):
    path = write("a.jsonl", [chat(f"q{index}") for index in range(20)])
    first, again, other = (
        [
            example.source
            for example in prepare_data(config(path, test_size=test_size, shuffle_seed=seed), renderer).eval
        ]
        for seed in (1, 1, 2)
    )
    assert len(first) == count
    assert first == again
    assert first != other
    last = prepare_data(config(path, test_size=test_size, shuffle_seed=None), renderer).eval
    assert [example.source for example in last] == [f"{path}:{line}" for line in range(21 - count, 21)]


def test_eval_files_and_held_out_rows_are_judged_by_together(write, config, renderer):
    path, other = write("a.jsonl", [chat(f"q{index}") for index in range(8)]), write("b.jsonl", [chat("z"), chat("y")])
    prepared = prepare_data(config(path, eval=[other], test_size=2), renderer)
    examples = [prepared.eval[index] for index in range(4)]
    assert [example.source for example in examples[:2]] == [f"{other}:1", f"{other}:2"]
    assert prepared.eval.lengths.tolist() == [len(example) for example in examples]
    assert prepared.eval.digest == ExampleList(examples).digest
    with pytest.raises(IndexError):
        prepared.eval[4]


def test_held_out_files_of_the_training_folder_are_used_and_said(write, config, renderer, tmp_path):
    write("train.jsonl", [chat("a"), chat("b")])
    write("valid.jsonl", [chat("c")])
    prepared = prepare_data(config(tmp_path), renderer)
    assert (len(prepared.train), len(prepared.eval)) == (2, 1)
    assert any(decision.key == "data.eval" for decision in prepared.decisions)


def test_the_limit_on_rows_is_kept_and_unread_sources_are_named(write, config, renderer):
    first, second = write("a.jsonl", [chat(f"a{index}") for index in range(5)]), write("b.jsonl", [chat("b")])
    prepared = prepare_data(config(first, second, max_samples=4), renderer)
    assert prepared.ledger.summary()["train"]["input"] == 4
    assert [decision.reason for decision in prepared.decisions if decision.key == "data.max_samples"] == [
        f"reached before these sources, of which nothing is used: {second}"
    ]


def test_nothing_left_to_train_on_is_refused_with_the_sum(write, config, renderer):
    with pytest.raises(DataError, match=r"no row is left to train on: 1 input rows = 0 used \+ 0 cut \+ 1 dropped"):
        prepare_data(config(write("a.jsonl", [chat("a", weight=0)])), renderer)
    with pytest.raises(DataError, match="2 held-out rows leave nothing of 2 usable rows"):
        prepare_data(config(write("a.jsonl", [chat("a"), chat("b")]), test_size=2), renderer)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"test_size": 1.5}, "data.test_size"),
        ({"test_size": -1}, "data.test_size"),
        ({"max_length": 1}, "data.max_length"),
        ({"max_samples": 0}, "data.max_samples"),
        ({"num_workers": -1}, "data.num_workers"),
    ],
)
def test_values_that_mean_nothing_are_refused_before_anything_is_read(config, renderer, options, key):
    with pytest.raises(ConfigError) as caught:
        prepare_data(config("no-such-file.jsonl", **options), renderer)
    assert caught.value.problems[0].where == key


def test_each_file_has_its_own_format_and_the_choice_is_said(write, config, renderer):
    first, second = write("a.jsonl", [chat("a")]), write("b.jsonl", [{"instruction": "x", "output": "y"}])
    prepared = prepare_data(config(first, second), renderer)
    formats = [decision.value for decision in prepared.decisions if decision.key == "data.format"]
    assert formats == ["messages", "alpaca"]
    assert len(prepared.train) == 2


def test_texts_for_a_tokenizer_are_those_of_the_training_rows(write, config):
    path = write("a.jsonl", [chat("a", "b"), b"nope", {"messages": 3}, chat("c", "d")])
    assert list(iter_texts(config(path))) == ["a", "b", "c", "d"]


def test_rows_of_another_format_leave_no_texts_and_say_why(write, config):
    """Not "there is no text": the rows have text, in another format than the one that was named."""
    path = write("a.jsonl", [chat("a", "b"), chat("c", "d"), chat("e", "f"), chat("g", "h")])
    with pytest.raises(DataError, match="the row looks like messages, the others are alpaca") as caught:
        list(iter_texts(config(path, format="alpaca")))
    assert [problem.where for problem in caught.value.problems] == [f"{path}:{line}" for line in (1, 2, 3)]


# --- whatever the rows, whatever the workers
# --------------------------------------------------------------------------------------

ANY_ROW = st.one_of(
    st.builds(chat, st.text(max_size=6), st.text(max_size=30)),
    st.sampled_from(
        [
            chat("a"),
            chat("b", "x" * 99),
            chat("c", weight=0),
            chat("d", weight=-1),
            {"messages": []},
            {"text": "a"},
            3,
            None,
        ]
    ),
    st.binary(max_size=12).map(lambda data: data.replace(b"\n", b"").strip() or b"x"),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=4),
        lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=2),
    ),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(ANY_ROW, max_size=12),
    overlong=st.sampled_from(["error", "drop", "truncate_right", "truncate_left", "split"]),
    on_bad_row=st.sampled_from(["error", "skip"]),
    on_duplicate=st.sampled_from(["keep", "drop"]),
    test_size=st.sampled_from([0, 1, 0.5]),
)
def test_the_balance_adds_up_for_any_rows_and_only_data_errors_come_out(
    write, config, renderer, rows, overlong, on_bad_row, on_duplicate, test_size
):
    path = write("a.jsonl", [chat("first"), *rows])
    given = config(
        path, overlong=overlong, on_bad_row=on_bad_row, on_duplicate=on_duplicate, test_size=test_size, max_length=48
    )
    prepared = survey_data(given, renderer)
    counts = balance(prepared)
    assert sum(counts.values()) == len(rows) + 1
    assert len({entry["source"] for entry in prepared.ledger.entries}) == len(list(prepared.ledger.entries))
    if on_bad_row == "error":
        assert len(prepared.problems) >= counts.get("bad", 0)
    if prepared.problems:
        with pytest.raises(DataError) as caught:
            prepare_data(given, renderer)
        assert caught.value.problems == prepared.problems
    else:
        assert prepare_data(given, renderer).train.digest == prepared.train.digest


def test_the_result_does_not_depend_on_the_number_of_processes(write, config, renderer, monkeypatch, tmp_path):
    """P3: also not on which batches they get, nor when a worker dies."""
    rows = [chat(f"question {index}", "word " * (index % 70)) if index % 13 else b"nope" for index in range(1, 1201)]
    monkeypatch.setattr(workers, "BATCHES_IN_PROCESS", 1)
    path = write("a.jsonl", rows)
    given = config(path, on_bad_row="skip", overlong="split", max_length=64, test_size=0.1)
    results = []
    for count in (1, 2, 3):
        prepared = prepare_data(replace(given, num_workers=count, cache_dir=str(tmp_path / f"cache{count}")), renderer)
        results.append((prepared.train.digest, prepared.eval.digest, list(prepared.ledger.entries)))
    assert results[0] == results[1] == results[2]


def test_a_worker_that_dies_costs_time_and_nothing_else(write, renderer, config, monkeypatch, tmp_path):
    path = write("a.jsonl", [chat(f"question {index}", "word " * (index % 70) + "end") for index in range(1200)])
    monkeypatch.setattr(workers, "BATCHES_IN_PROCESS", 1)
    expected = prepare_data(config(path, max_length=512), renderer).train.digest
    monkeypatch.setattr(workers, "_SERVE", "raise SystemExit(1)")
    again = prepare_data(config(path, max_length=512, num_workers=2, cache_dir=str(tmp_path / "other")), renderer)
    assert again.train.digest == expected


def test_progress_tells_rows_done_of_all_and_their_rate(write, config, renderer):
    calls = []
    path = write("a.jsonl", [chat(f"q{index}") for index in range(10)])
    prepare_data(config(path), renderer, progress=lambda *arguments: calls.append(arguments))
    assert calls[-1][:2] == (10, 10)
    assert calls[-1][2] > 0


def test_stopping_in_the_middle_leaves_no_process_and_no_folder(write, renderer, config, tmp_path, monkeypatch):
    """Ctrl-C during tokenizing: nothing half-made stays (Q8)."""
    path = write("a.jsonl", [chat(f"question {index}", "word " * 60) for index in range(1200)])
    monkeypatch.setattr(workers, "BATCHES_IN_PROCESS", 1)

    def stop(done, total, rate):
        if done > 600:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_data(config(path, max_length=512, num_workers=2), renderer, progress=stop)
    assert list((tmp_path / "cache" / "rows").iterdir()) == []


def test_train_on_decides_what_a_row_without_answers_is(write, config, tiny_tokenizer):
    path = write("a.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    prepared = prepare_data(config(path, train_on="all_messages"), Renderer(tiny_tokenizer, train_on="all_messages"))
    assert balance(prepared) == {"used": 1}
