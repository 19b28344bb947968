"""Answers beside references: the command, the scores, and two models beside each other."""

import json

import pytest

from llmtune.cli.main import main
from llmtune.config.schema import DataConfig, SourceConfig
from llmtune.data.dataset.make_dataset import prepare_data
from llmtune.data.example import Conversation, Message
from llmtune.data.rendering.renderer import Renderer
from llmtune.data.rows.preferences import RECOGNIZED_BY
from llmtune.errors import UsageError
from llmtune.evaluation.judged_rows import judged_rows
from llmtune.evaluation.predictions import Prediction, split_at_answer
from llmtune.evaluation.scores import SCORES, find_score


@pytest.fixture
def run(capsys):
    """Run one command line; return (exit code, stdout, stderr)."""

    def run_one(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run_one


@pytest.fixture
def rows(tmp_path):
    """Three conversations."""
    path = tmp_path / "rows.jsonl"
    pairs = [("a", "system of words"), ("hello", "numbers"), ("the user asks", "0123456789")]
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]})
            + "\n"
            for user, answer in pairs
        )
    )
    return path


def test_an_answer_is_exact_character_by_character():
    assert Prediction("a:1", "p", "x y", "x y", 2).is_exact
    assert not Prediction("a:1", "p", "x y", "x  y", 2).is_exact


def lines_of(out):
    return [json.loads(line) for line in out.splitlines()]


def test_each_row_is_answered_beside_its_reference_in_its_order(run, rows, tiny_model_folder):
    code, out, err = run("predict", tiny_model_folder, "--data", rows, "--max-new-tokens", "6")
    assert code == 0, err
    lines = lines_of(out)
    assert [line["source"].rpartition(":")[2] for line in lines] == ["1", "2", "3"]
    assert [line["reference"] for line in lines] == ["system of words", "numbers", "0123456789"]
    assert all("<|im_start|>assistant\n" in line["prompt"] for line in lines)
    assert all(line["exact"] is (line["answer"] == line["reference"]) for line in lines)
    assert f"{sum(line['exact'] for line in lines)} of 3 answers exactly right" in err
    one = run("predict", tiny_model_folder, "--data", rows, "--max-new-tokens", "6", "--batch-size", "1")[1]
    assert lines_of(one) == lines


def test_an_answer_is_never_longer_than_asked_also_where_its_reference_is(run, rows, tiny_model_folder):
    code, out, err = run("predict", tiny_model_folder, "--data", rows, "--max-new-tokens", "2")
    assert code == 0, err
    assert [line["num_tokens"] for line in lines_of(out)] == [2, 2, 2]
    assert "3 of 3 references have more than 2 tokens" in err


def test_only_wrong_answers_are_printed_where_they_are_asked_for(run, rows, tiny_model_folder):
    arguments = ("predict", tiny_model_folder, "--data", rows, "--max-new-tokens", "6")
    wrong = [line for line in lines_of(run(*arguments)[1]) if not line["exact"]]
    assert lines_of(run(*arguments, "--only-wrong")[1]) == wrong


def prepared(rows, method, tokenizer, tmp_path):
    """The examples that training by `method` would make of these rows."""
    path = tmp_path / "made.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=(SourceConfig(str(path)),), max_length=256, cache_dir=str(tmp_path / "cache"))
    renderer = Renderer(tokenizer, train_on=data.train_on)
    return prepare_data(data, renderer, formats=RECOGNIZED_BY[method]).train


def text_of_side(example, tokenizer):
    prompt, answer = split_at_answer(example)
    return example.side, tokenizer.decode(prompt), tokenizer.decode(answer).removesuffix("<|im_end|>")


@pytest.mark.parametrize("form", ["messages", "texts"])
def test_the_wrong_answers_of_a_model_are_printed_as_pairs_to_train_on(
    form, run, rows, tiny_model_folder, tiny_tokenizer, tmp_path
):
    if form == "texts":
        rows.write_text(
            '{"prompt": "a ", "completion": "system of words"}\n{"prompt": "b ", "completion": "numbers"}\n'
        )
    words = ("predict", tiny_model_folder, "--data", rows, "--max-new-tokens", "6", "--repetition-penalty", "5")
    answered = lines_of(run(*words)[1])
    assert not any(line["exact"] for line in answered)
    code, out, err = run(*words, "--as", "pairs")
    assert code == 0, err
    assert f"0 of {len(answered)} answers exactly right\n{len(answered)} pairs made" in err
    examples = prepared(lines_of(out), "dpo", tiny_tokenizer, tmp_path)
    assert [text_of_side(examples[index], tiny_tokenizer) for index in range(len(examples))] == [
        (side, line["prompt"], line[name])
        for line in answered
        for side, name in (("chosen", "reference"), ("rejected", "answer"))
    ]


def test_all_answers_of_a_model_are_printed_with_a_label(run, rows, tiny_model_folder, tiny_tokenizer, tmp_path):
    words = ("predict", tiny_model_folder, "--data", rows, "--max-new-tokens", "6", "--repetition-penalty", "5")
    answered = lines_of(run(*words)[1])
    right = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": answered[0]["answer"]}]}
    rows.write_text(json.dumps(right) + "\n" + "".join(rows.read_text().splitlines(keepends=True)[1:]))
    path = tmp_path / "labels.jsonl"
    assert run(*words, "--as", "labels", "--output", path)[:2] == (0, "")
    made = lines_of(path.read_text())
    assert "exists already" in run(*words, "--as", "labels", "--output", path)[2]
    assert [row["label"] for row in made] == [True, False, False]
    examples = prepared(made, "kto", tiny_tokenizer, tmp_path)
    assert [text_of_side(examples[index], tiny_tokenizer) for index in range(len(examples))] == [
        ("desirable" if place == 0 else "undesirable", line["prompt"], line["answer"])
        for place, line in enumerate(answered)
    ]
    assert len(lines_of(run(*words, "--as", "pairs")[1])) == 2


def test_an_answer_that_is_more_than_a_text_or_empty_makes_no_row():
    asked, right = Message("user", "1 + 1?"), Message("assistant", "2", extra={"reasoning_content": "easy"})
    conversation = Conversation("a:1", messages=(asked, right))
    with_reasoning = Prediction("a:1", "p", "<think>easy</think>2", "3", 2)
    assert list(judged_rows([with_reasoning], {"a:1": conversation}, "pairs")) == [None]
    text_alone = Prediction("a:1", "p", "2", "3", 2)
    (row,) = judged_rows([text_alone], {"a:1": conversation}, "pairs")
    assert (row["chosen"], row["rejected"]) == (
        [{"role": "assistant", "content": "2"}],
        [{"role": "assistant", "content": "3"}],
    )
    assert list(judged_rows([Prediction("a:1", "p", "2", " ", 2)], {"a:1": conversation}, "labels")) == [None]


def test_answers_that_make_no_row_are_no_file(run, rows, tiny_model_folder, tmp_path):
    """Greedy answers of these random weights are line ends."""
    words = ("--data", rows, "--max-new-tokens", "2", "--as", "pairs", "--output", tmp_path / "pairs.jsonl")
    code, _, err = run("predict", tiny_model_folder, *words)
    assert code == 3
    assert "3 of 3 references have more than 2 tokens" in err
    assert "3 left out: an empty answer" in err
    assert "draw answers with --temperature 1" in err
    assert not (tmp_path / "pairs.jsonl").exists()


def test_rows_to_train_on_are_never_made_of_held_out_ones(run, rows, tiny_model_folder):
    code, _, err = run("predict", tiny_model_folder, "--as", "pairs")
    assert code == 2
    assert "give --data ROWS" in err
    code, _, err = run("predict", tiny_model_folder, "--data", rows, "--as", "pairs", "--only-wrong")
    assert code == 2
    assert "leave out --score and --only-wrong" in err


def test_the_count_of_evaluate_and_the_marks_of_predict_are_one(run, rows, short_model_folder):
    marks = [line["exact"] for line in lines_of(run("predict", short_model_folder, "--data", rows)[1])]
    code, out, err = run("evaluate", short_model_folder, "--data", rows, "--exact-match", "--score", "exact", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["eval_exact_answers"], found["eval_num_answers"]) == (sum(marks), 3)
    assert found["eval_score"] == pytest.approx(sum(marks) / 3)


def test_a_function_of_the_user_judges_each_answer(run, rows, tiny_model_folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def length(prompt, reference, answer):\n    assert prompt\n    return len(reference)\n"
    )
    arguments = ("--data", rows, "--max-new-tokens", "4", "--score", f"{tmp_path / 'mine.py'}:length")
    code, out, err = run("predict", tiny_model_folder, *arguments)
    assert code == 0, err
    scores = [line["score"] for line in lines_of(out)]
    assert scores == [float(len(line["reference"])) for line in lines_of(out)]
    assert f"mean score {sum(scores) / 3:.4g}" in err


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("def mine(prompt, reference, answer):\n    return 1 / 0\n", "ZeroDivisionError: division by zero (mine.py:2)"),
        ("def mine(prompt, reference):\n    return 1\n", "too many positional arguments"),
        ("def mine(:\n", "SyntaxError"),
        ("import nothing_of_that_name\n", "No module named 'nothing_of_that_name' (mine.py:1)"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_fault_in_the_code_of_the_user_is_named_as_that(
    command, code, problem, run, rows, short_model_folder, tmp_path
):
    (tmp_path / "mine.py").write_text(code)
    more = ("--max-new-tokens", "1") if command == "predict" else ()
    words = (command, short_model_folder, "--data", rows, *more, "--score", f"{tmp_path / 'mine.py'}:mine")
    exit_code, _, err = run(*words)
    assert exit_code == 2
    assert problem in err
    assert "(prompt, reference, answer)" in err


def test_rows_of_other_columns_are_answered_with_the_option_that_reads_them(run, rows, tiny_model_folder):
    rows.write_text(json.dumps({"chat": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}))
    code, _, err = run("predict", tiny_model_folder, "--data", rows)
    assert code == 3
    assert "--data '{path: FILE, columns: {messages: chat}}'" in err
    option = f"{{path: {rows}, columns: {{messages: chat}}}}"
    assert run("predict", tiny_model_folder, "--data", option, "--max-new-tokens", "1")[0] == 0


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("bleu", "there is no score `bleu`"),
        ("nowhere.py:score", "there is no file `nowhere.py`"),
        ("{}:other", "has no function `other`"),
        ("{}:of_a_reward", "`of_a_reward` does not take what it is given: "),
    ],
)
def test_a_score_that_is_not_there_is_answered_with_those_that_are(name, problem, tmp_path):
    of_a_reward = "def of_a_reward(*, prompts, completions):\n    return [1]\n"
    (tmp_path / "mine.py").write_text(f"def mine(prompt, reference, answer):\n    return 1\n{of_a_reward}")
    with pytest.raises(UsageError, match=problem) as error:
        find_score(name.format(tmp_path / "mine.py"))
    assert error.value.problems[0].fix


@pytest.mark.parametrize(
    ("name", "reference", "answer", "value"),
    [
        ("exact", "Paris", "Paris", 1.0),
        ("exact", "Paris", "Paris.", 0.0),
        ("contains", "Paris", "It is paris.", 1.0),
        ("contains", "Paris", "Pa ris", 0.0),
        ("f1", "", "", 1.0),
        ("f1", "a b", "c d", 0.0),
        ("f1", "a a b", "a b b", pytest.approx(2 / 3)),
        ("number", "#### 42", "6 * 7 = 42.0", 1.0),
        ("number", "#### -3", "3", 0.0),
        ("number", "none", "none", 0.0),
    ],
)
def test_the_built_in_scores(name, reference, answer, value):
    assert SCORES[name]("", reference, answer) == value


def test_any_two_models_are_compared(run, tiny_model_folder, tmp_path):
    other = tmp_path / "other"
    code, _, err = run("export", tiny_model_folder, "--output", other, "--dtype", "bfloat16")
    assert code == 0, err
    alone = [
        json.loads(run("generate", model, "hello", "--max-new-tokens", "6", "--json")[1])["text"]
        for model in (tiny_model_folder, other)
    ]
    for words in ((other, "hello"), ("hello", "--with", other)):
        code, out, err = run("compare", tiny_model_folder, *words, "--max-new-tokens", "6", "--json")
        assert code == 0, err
        assert json.loads(out) == {"prompt": "hello", str(tiny_model_folder): alone[0], str(other): alone[1]}


def test_sampling_options_reach_the_model(run, tiny_model_folder):
    arguments = ("generate", tiny_model_folder, "the user asks", "--max-new-tokens", "12", "--json")
    plain = json.loads(run(*arguments)[1])
    assert json.loads(run(*arguments, "--temperature", "2", "--top-k", "1")[1]) == plain
    _, out, err = run(*arguments, "--top-k", "5", "--top-p", "0.5")
    assert json.loads(out) == plain
    assert "no token is drawn at temperature 0, so --top-k and --top-p changes nothing" in err
    assert json.loads(run(*arguments, "--repetition-penalty", "5")[1])["text"] != plain["text"]
    assert run(*arguments, "--stop", "\n")[0] == 0  # a line end is a value, and no empty one
    stopped = json.loads(run(*arguments, "--stop", plain["text"][3:5])[1])
    assert stopped["stopped_by"] == "stop_text"
    assert stopped["text"] == plain["text"].partition(plain["text"][3:5])[0]
