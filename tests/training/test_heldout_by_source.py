"""Each held-out source has a loss of its own beside that of all rows: in metrics, on the screen, from `evaluate`."""

import json

import pytest

from llmtune.cli.main import main
from llmtune.training import train as training
from llmtune.training.progress import summary_facts
from training_helpers import lines_of


@pytest.fixture(scope="module")
def two_sets(rows_file, tmp_path_factory):
    """The first four rows in one file, four long answers in another."""
    folder = tmp_path_factory.mktemp("held-out")
    lines = rows_file.read_text().splitlines()
    (folder / "short.jsonl").write_text("".join(line + "\n" for line in lines[:4]))
    (folder / "long.jsonl").write_text("".join(line + "\n" for line in lines[5:9]).replace('"}]', ' and on and on"}]'))
    return folder


@pytest.fixture
def evaluated(two_sets, config_of):
    sources = f"data.eval=[{{path: {two_sets / 'short.jsonl'}, name: first}}, {two_sets / 'long.jsonl'}]"
    return lambda *more: config_of("data.test_size=0", sources, "training.max_steps=2", *more)


def measured(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 0, err
    return json.loads(out)


def test_every_source_has_its_mean_and_all_rows_are_their_sum(evaluated, two_sets, capsys):
    result = training.train(evaluated("evaluation.best_by=eval_first_mean_nll"))
    lines = [line for line in lines_of(result.folder) if "eval_mean_nll" in line]
    assert len(lines) == 2
    for line in lines:
        assert {key for key in line if key.endswith("_mean_nll")} == {
            "eval_mean_nll",
            "eval_first_mean_nll",
            "eval_long_mean_nll",
        }
    first, long = (measured(capsys, result.folder, "--data", two_sets / f"{name}.jsonl") for name in ("short", "long"))
    last = lines[-1]
    assert last["eval_first_mean_nll"] == pytest.approx(first["eval_mean_nll"], rel=1e-6)
    assert last["eval_long_mean_nll"] == pytest.approx(long["eval_mean_nll"], rel=1e-6)
    weights = first["eval_num_loss_tokens"], long["eval_num_loss_tokens"]
    assert weights[0] != weights[1]  # so that a mean of the two means would be told apart
    nats = first["eval_mean_nll"] * weights[0] + long["eval_mean_nll"] * weights[1]
    assert last["eval_mean_nll"] == pytest.approx(nats / sum(weights), rel=1e-6)
    assert last["eval_num_loss_tokens"] == sum(weights)
    assert result.eval_state.best_value == min(line["eval_first_mean_nll"] for line in lines)
    own = str(summary_facts(result.metrics, result.eval_state)[-1])
    assert (
        own
        == f"held-out loss by source: first {last['eval_first_mean_nll']:.4f}, long {last['eval_long_mean_nll']:.4f}"
    )
    together = measured(capsys, result.folder, "--data", two_sets / "short.jsonl", "--data", two_sets / "long.jsonl")
    assert together["eval_short_mean_nll"] == pytest.approx(first["eval_mean_nll"], rel=1e-6)
    assert together["eval_mean_nll"] == pytest.approx(last["eval_mean_nll"], rel=1e-6)
    assert measured(capsys, result.folder).keys() == {key for key in last if key.startswith("eval_")}


def test_rows_held_out_of_several_training_sources_are_told_apart(two_sets, config_of):
    sources = f"data.train=[{two_sets / 'short.jsonl'}, {two_sets / 'long.jsonl'}]"
    result = training.train(config_of(sources, "data.test_size=4", "training.max_steps=1"))
    names = {key for line in lines_of(result.folder) for key in line if key.endswith("_mean_nll")}
    assert {"eval_short_mean_nll", "eval_long_mean_nll"} <= names


def test_one_source_has_the_loss_of_all_rows_alone(config_of):
    result = training.train(config_of("training.max_steps=1"))
    names = {key for line in lines_of(result.folder) for key in line if key.startswith("eval_")}
    assert names == {"eval_mean_nll", "eval_perplexity", "eval_bits_per_byte", "eval_num_loss_tokens"}


def test_evaluate_reads_rows_as_a_source_says(config_of, two_sets, tmp_path, capsys):
    """`--data` takes what an entry of `data.train` may be, and its errors name the option."""
    result = training.train(config_of("training.max_steps=1"))
    pairs = [json.loads(line)["messages"] for line in (two_sets / "short.jsonl").read_text().splitlines()]
    path = tmp_path / "renamed.jsonl"
    path.write_text("".join(json.dumps({"ask": ask["content"], "say": say["content"]}) + "\n" for ask, say in pairs))
    renamed = measured(capsys, result.folder, "--data", f"{{path: {path}, columns: {{question: ask, answer: say}}}}")
    assert renamed == measured(capsys, result.folder, "--data", two_sets / "short.jsonl")
    for value, code, said in (
        (path, 3, "--data '{path: FILE, columns: {question: ..., answer: ...}}'"),
        (f"{{path: {path}, columns: {{questoin: ask}}}}", 2, "did you mean `question`?"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", str(result.folder), "--data", str(value)])
        assert stopped.value.code == code
        assert said in capsys.readouterr().err
