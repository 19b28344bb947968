"""A file with a section `sweep:` becomes the configs of its runs, or every problem at once with its line."""

import pytest

from llmtune.config.layers import load_config
from llmtune.config.sweep import load_sweep
from llmtune.errors import ConfigError


@pytest.fixture
def sweep_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(section, basis="extends: test\nadapter: {method: lora}"):
        (tmp_path / "lr.yaml").write_text(f"{basis}\nsweep:\n" + "".join(f"  {line}\n" for line in section))
        return load_sweep("lr.yaml", environ={})

    return load


def problems_of(call, *arguments):
    with pytest.raises(ConfigError) as refused:
        call(*arguments)
    return [(problem.where, problem.problem) for problem in refused.value.problems]


def test_a_grid_is_every_combination_and_each_value_is_in_its_config(sweep_of):
    sweep = sweep_of(
        ["keys:", "  training.learning_rate: [1e-4, 3e-4]", "  adapter.target_modules: [all-linear, [q_proj]]"]
    )
    configs = [run.resolved.config for run in sweep.runs]
    assert [(one.training.learning_rate, one.adapter.target_modules) for one in configs] == [
        (1e-4, "all-linear"),
        (1e-4, ("q_proj",)),
        (3e-4, "all-linear"),
        (3e-4, ("q_proj",)),
    ]
    assert sweep.runs[0].name == "learning_rate=1e-4,target_modules=all-linear"
    assert len({run.name for run in sweep.runs}) == 4
    assert {str(run.path.parent) for run in sweep.runs} == {"runs/lr"}
    assert [one.run.name for one in configs] == [run.name for run in sweep.runs]
    assert str(sweep.runs[0].resolved.origins["training.learning_rate"]) == "lr.yaml:5"


def test_a_random_sweep_stays_in_its_ranges_and_keeps_its_draws_when_more_are_asked(sweep_of):
    keys = ["  training.learning_rate: {min: 1e-5, max: 1e-3, log: true}", "  adapter.r: {min: 4, max: 6}"]
    few, many = (sweep_of(["method: random", f"runs: {count}", "keys:", *keys]) for count in (3, 40))
    assert [run.name for run in many.runs[:3]] == [run.name for run in few.runs]
    configs = [run.resolved.config for run in many.runs]
    rates = sorted(one.training.learning_rate for one in configs)
    assert 1e-5 <= rates[0] < rates[-1] <= 1e-3
    assert 10 <= sum(rate < 1e-4 for rate in rates) <= 30, "logarithmic: half of the draws lie below the middle"
    assert {one.adapter.r for one in configs} == {4, 5, 6}
    other = sweep_of(["method: random", "runs: 3", "seed: 1", "keys:", *keys])
    assert {run.name for run in other.runs}.isdisjoint(run.name for run in few.runs)


def test_unknown_keys_and_values_are_refused_all_at_once_with_their_lines(sweep_of):
    section = [
        "metod: grid",
        "runs: 3",
        "keys:",
        "  training.lerning_rate: [1]",
        "  training.epochs: [1, many]",
        "  adapter.r: {min: 1, max: 2}",
        "  adapter.alpha: [8, 8.0]",
        "  training.batch_size: 4",
        "  run.name: [a, b]",
    ]
    found = problems_of(sweep_of, section, "training: {max_stebs: 3}")
    assert [where for where, _ in found] == [f"lr.yaml:{line}" for line in (3, 4, 6, 7, 8, 9, 10, 11, 1)]
    said = [problem for _, problem in found]
    assert said[0] == "unknown key `sweep.metod` (`grid`)"
    assert said[1] == "`sweep.runs` counts only with `method: random`"
    assert said[2] == "unknown key `training.lerning_rate` (`[1]`)"
    assert "`many`" in said[3]
    assert said[5] == "`adapter.alpha` has `8.0` twice"
    assert "max_stebs" in said[8]


def test_values_that_contradict_the_rest_are_refused_before_any_run(sweep_of):
    basis = "extends: test\nmodel: {quantization: 4bit}"
    found = problems_of(sweep_of, ["keys:", "  adapter.method: [lora, none]"], basis)
    assert len(found) == 1
    assert "adapter.method" in found[0][1]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (["method: random", "runs: 5", "keys: {adapter.r: [4, 8]}"], "`sweep.runs` is 5, and the keys give 2"),
        (["method: random", "keys: {adapter.r: [4, 8]}"], "`method: random` needs `sweep.runs`"),
        (["method: random", "runs: 0", "keys: {adapter.r: [4, 8]}"], "must be at least 1, not `0`"),
        (["method: random", "runs: 2", "keys: {adapter.r: {min: 8, max: 4}}"], "no range from `8` to `4`"),
        (["method: random", "runs: 2", "keys: {adapter.r: {min: 4}}"], "a list or a range, not `{min: 4}`"),
        (["method: random", "runs: 2", "keys: {data.packing: {min: 4, max: 5}}"], "is not a number"),
        (["keys: {}"], "names no key"),
        (["name: ../up", "keys: {adapter.r: [4]}"], "not `../up`"),
        (["keys: {run.seed: [" + ", ".join(map(str, range(1001))) + "]}"], "more than 1,000 runs"),
    ],
)
def test_a_section_that_describes_no_runs_is_refused(sweep_of, section, said):
    assert any(said in problem for _, problem in problems_of(sweep_of, section))


def test_a_file_of_a_sweep_is_no_config_of_one_run_and_the_other_way_round(sweep_of, tmp_path):
    sweep_of(["keys: {adapter.r: [4, 8]}"])
    assert "it describes several runs" in problems_of(load_config, "lr.yaml")[0][1]
    (tmp_path / "over.yaml").write_text("extends: lr.yaml\nsweep: {keys: {run.seed: [1, 2]}}\n")
    assert problems_of(load_sweep, "over.yaml")[0][0] == "lr.yaml:3", "the section of a base would not be read"
    assert "no section `sweep`" in problems_of(load_sweep, "test")[0][1]
