"""The `config` and `split` of a source take the rows they name, or are refused by name; what is swept in is said."""

import json

import pytest

from llmtune.config.layers import load_config
from llmtune.config.schema import SourceConfig
from llmtune.data.dataset.make_dataset import named_twice, prepare_data, swept_in
from llmtune.data.reading.find_files import find_files
from llmtune.data.reading.split_slices import parse_split
from llmtune.errors import ConfigError, DataError
from read_rows import read_rows

CARD = "---\nlicense: mit\nconfigs:\n{configs}---\n# A data set\n"


def fill(folder, names, rows=1):
    """Write a jsonl file for each name; each row says where it comes from."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(rows)))
    return folder


def names(source, purpose="train"):
    return [row.fields["text"].split()[0] for row in read_rows((source,), purpose=purpose)]


def refusal(*sources, purpose="train"):
    with pytest.raises(DataError) as caught:
        find_files(sources, purpose)
    return [str(problem) for problem in caught.value.problems]


@pytest.fixture
def two_configs(tmp_path):
    return fill(tmp_path / "set", ["en/train-0.jsonl", "en/test-0.jsonl", "de/train-0.jsonl"])


def test_a_config_of_a_folder_takes_the_folder_of_that_name(two_configs):
    assert names(SourceConfig(str(two_configs), config="de")) == ["de/train-0.jsonl"]
    assert names(SourceConfig(str(two_configs), config="en", split="test")) == ["en/test-0.jsonl"]


def test_a_folder_with_two_configs_and_none_named_is_refused_with_both_names(two_configs):
    (problem,) = refusal(SourceConfig(str(two_configs)))
    assert "has 2 configs: de, en" in problem
    assert f"{{path: {two_configs}, config: de}}" in problem


def test_configs_may_lie_in_a_folder_called_data(tmp_path):
    path = fill(tmp_path / "set", ["data/en/train-0.jsonl", "data/en/test-0.jsonl", "data/de/train-0.jsonl"])
    assert "has 2 configs: de, en" in refusal(SourceConfig(str(path)))[0]
    assert names(SourceConfig(str(path), config="de")) == ["data/de/train-0.jsonl"]
    splits = fill(tmp_path / "other", ["data/train/a.jsonl", "data/test/b.jsonl"])
    assert names(SourceConfig(str(splits))) == ["data/train/a.jsonl"]


def test_one_config_in_the_readme_does_not_hide_the_other_folder(two_configs):
    (two_configs / "README.md").write_text(
        CARD.format(configs="- config_name: en\n  data_files:\n  - split: train\n    path: en/train*\n")
    )
    assert "has 2 configs: en, de" in refusal(SourceConfig(str(two_configs)))[0]
    assert names(SourceConfig(str(two_configs), config="en")) == ["en/train-0.jsonl"]


def test_an_unknown_config_is_refused_with_the_known_ones(two_configs):
    assert "has no config 'fr' (there are: de, en)" in refusal(SourceConfig(str(two_configs), config="fr"))[0]


CARDS = {
    "splits": "- config_name: a\n  data_files:\n  - split: train\n    path: [x/*.jsonl]\n",
    "mapping": "- config_name: a\n  data_files: {train: x/*.jsonl, test: y/1.jsonl}\n",
    "patterns": "- config_name: a\n  data_files: [x/*.jsonl]\n",
    "folder": "- config_name: a\n  data_dir: x\n",
}


@pytest.mark.parametrize("form", CARDS)
def test_the_readmes_data_files_are_used_in_every_form_they_have(tmp_path, form):
    folder = fill(tmp_path / "set", ["x/1.jsonl", "y/1.jsonl"])
    (folder / "README.md").write_text(CARD.format(configs=CARDS[form] + "- config_name: b\n  data_files: y/*\n"))
    assert names(SourceConfig(str(folder), config="a")) == ["x/1.jsonl"]
    assert names(SourceConfig(str(folder), config="b")) == ["y/1.jsonl"]
    assert "has 2 configs: a, b" in refusal(SourceConfig(str(folder)))[0]


@pytest.mark.parametrize("default", ["config_name: default", "config_name: b\n  default: true"])
def test_the_readmes_default_is_taken_without_asking(tmp_path, default):
    folder = fill(tmp_path / "set", ["x/1.jsonl", "y/1.jsonl"])
    configs = f"- config_name: a\n  data_files: x/*\n- {default}\n  data_files: y/*\n"
    (folder / "README.md").write_text(CARD.format(configs=configs))
    assert names(SourceConfig(str(folder))) == ["y/1.jsonl"]


def test_a_readme_names_no_file_outside_of_its_folder(tmp_path):
    folder = fill(tmp_path / "set", ["x/1.jsonl"])
    fill(tmp_path, ["secret.jsonl"])
    for pattern in ("../secret.jsonl", str(tmp_path / "secret.jsonl"), ""):
        (folder / "README.md").write_text(CARD.format(configs=f"- config_name: a\n  data_files: '{pattern}'\n"))
        assert "holds no file" in refusal(SourceConfig(str(folder), config="a"))[0]


def test_a_readme_that_cannot_be_read_is_no_list_of_configs(tmp_path):
    folder = fill(tmp_path / "set", ["train.jsonl"])
    for text in ("", "# no front matter", "---\nconfigs: [", "---\nconfigs: {a: 1}\n---\n", "---\n- a\n---\n"):
        (folder / "README.md").write_text(text)
        assert names(SourceConfig(str(folder))) == ["train.jsonl"]


def test_keys_that_a_kind_of_source_does_not_use_are_refused_all_at_once(tmp_path):
    import datasets

    fill(tmp_path, ["rows.jsonl"])
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "saved"))
    problems = refusal(
        SourceConfig(f"{tmp_path}/rows.jsonl", config="en", split="validation"),
        SourceConfig(f"{tmp_path}/*.jsonl", config="en"),
        SourceConfig(f"{tmp_path}/saved", config="en"),
        SourceConfig(f"{tmp_path}/saved", split="test"),
        SourceConfig("example:alpaca", config="en"),
    )
    where = ["data.train[0]", "data.train[0]", *(f"data.train[{index}]" for index in (1, 2, 3, 4))]
    assert [problem.split(":")[0] for problem in problems] == where
    assert "`config: en` names nothing" in problems[0]
    assert "has no split 'validation'" in problems[1]


def test_unknown_keys_of_all_sources_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(
            None,
            environ={},
            overrides=["data.train=[{path: a, colums: x, max_sample: 3}, {path: b, type: alpaca, weight: heavy}]"],
        )
    problems = [str(problem) for problem in caught.value.problems]
    keys = ("colums", "max_sample", "type", "heavy")
    assert [f"not `{key}`" in problem for key, problem in zip(keys, problems, strict=True)] == [True] * 4
    assert "did you mean `max_samples`?" in problems[1]


def test_test_files_that_a_pattern_takes_are_said_and_a_split_leaves_them_out(tmp_path, config, renderer):
    fill(tmp_path, ["train-0.jsonl", "test-0.jsonl"])
    pattern = f"{tmp_path}/*.jsonl"
    (said,) = swept_in(find_files([SourceConfig(pattern)], "train"), "train")
    assert said.key == "data.train[0]"
    assert f"the pattern also takes {tmp_path}/test-0.jsonl" in said.reason
    assert said in prepare_data(config(SourceConfig(pattern)), renderer).decisions
    assert names(SourceConfig(pattern, split="train")) == ["train-0.jsonl"]
    assert swept_in(find_files([SourceConfig(pattern, split="train")], "train"), "train") == []
    assert "has no split 'dev'" in refusal(SourceConfig(pattern, split="dev"))[0]


def test_training_files_that_a_pattern_of_held_out_rows_takes_are_said(tmp_path):
    fill(tmp_path, ["train-0.jsonl", "test-0.jsonl"])
    (said,) = swept_in(find_files([SourceConfig(f"{tmp_path}/*.jsonl")], "eval"), "eval")
    assert "train-0.jsonl" in said.reason


def test_several_folders_or_splits_that_one_folder_gives_are_said(tmp_path):
    folders = fill(tmp_path / "languages", ["en/rows.jsonl", "de/rows.jsonl"])
    (said,) = swept_in(find_files([SourceConfig(str(folders))], "train"), "train")
    assert said.value == "de, en"
    assert names(SourceConfig(str(folders), config="en")) == ["en/rows.jsonl"]
    splits = fill(tmp_path / "ultra", ["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"])
    (said,) = swept_in(find_files([SourceConfig(str(splits))], "train"), "train")
    assert said.value == "train_gen, train_sft"
    assert names(SourceConfig(str(splits), split="train_sft")) == ["data/train_sft-00000-of-00001.jsonl"]


# --- slices of a split

SLICES = {
    "train[:1%]": (0, 2),
    "train[:50%]": (0, 100),
    "train[100:]": (100, 200),
    "train[-10%:]": (180, 200),
    "train[150:160]": (150, 160),
    "train[:1000]": (0, 200),
}


@pytest.mark.parametrize("split", SLICES)
def test_a_slice_takes_the_rows_that_datasets_takes(tmp_path, split):
    import datasets

    fill(tmp_path, ["rows.jsonl"], rows=200)
    rows = list(read_rows((SourceConfig(f"{tmp_path}/rows.jsonl", split=split),)))
    theirs = datasets.load_dataset(
        "json", data_files=f"{tmp_path}/rows.jsonl", split=split, cache_dir=str(tmp_path / "cache")
    )
    assert [dict(row.fields) for row in rows] == list(theirs)
    begin, end = SLICES[split]
    assert [row.source for row in rows] == [f"{tmp_path}/rows.jsonl:{number + 1}" for number in range(begin, end)]


def test_slices_go_over_the_files_of_a_split_and_may_be_joined(tmp_path):
    folder = fill(tmp_path / "set", ["train-0.jsonl", "train-1.jsonl", "test.jsonl"], rows=4)
    source = SourceConfig(str(folder), split="train[3:5]+test[-1:]+train[:1]")
    assert names(source) == ["train-0.jsonl", "train-1.jsonl", "test.jsonl", "train-0.jsonl"]


def test_a_slice_of_a_saved_data_set_keeps_the_numbers_of_its_rows(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"text": str(number)} for number in range(10)])
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    found = list(read_rows((SourceConfig(f"{tmp_path}/saved", split="train[4:6]"),)))
    assert [(row.source, row.fields["text"]) for row in found] == [
        (f"{tmp_path}/saved/train[4]", "4"),
        (f"{tmp_path}/saved/train[5]", "5"),
    ]


def test_other_slices_are_other_sets_of_tokenized_rows(tmp_path, config, renderer):
    fill(tmp_path, ["rows.jsonl"], rows=6)
    prepared = [
        prepare_data(config(SourceConfig(f"{tmp_path}/rows.jsonl", split=split)), renderer)
        for split in ("train[:2]", "train[2:5]", "train[:2]+train[2:5]")
    ]
    assert [len(each.train) for each in prepared] == [2, 3, 5]


def test_a_split_that_is_none_and_a_slice_without_rows_are_refused(tmp_path):
    fill(tmp_path, ["rows.jsonl"], rows=3)
    path = f"{tmp_path}/rows.jsonl"
    for split in ("train[1]", "train[:x]", "train[:1", "a b"):
        assert "is no split" in refusal(SourceConfig(path, split=split))[0]
        assert parse_split(split) is None
    assert "takes no row of the 3" in refusal(SourceConfig(path, split="train[3:]"))[0]


def test_a_file_that_two_sources_read_in_the_same_way_is_named(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"question": "q", "answer": "a"}\n' * 4)
    one, all_files = SourceConfig(f"{tmp_path}/./a.jsonl"), SourceConfig(f"{tmp_path}/*.jsonl")
    (said,) = named_twice(find_files([one, all_files], "train"), "train")
    assert (said.key, said.value) == ("data.train[1]", f"{tmp_path}/a.jsonl")
    assert "data.train[0] too" in said.reason
    assert "`repeat: 2`" in said.reason
    others = [
        SourceConfig(str(tmp_path / "a.jsonl"), columns={"prompt": "answer", "completion": "question"}),
        SourceConfig(str(tmp_path / "a.jsonl"), split="train[:50%]"),
        SourceConfig(str(tmp_path / "a.jsonl"), split="train[50%:]"),
        SourceConfig(str(tmp_path / "b.jsonl")),
    ]
    assert list(named_twice(find_files([one, *others], "train"), "train")) == []


def test_a_folder_without_configs_is_the_default_one(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.jsonl").write_text('{"text": "a"}\n')
    for config in ("default", None):
        (file,) = find_files([SourceConfig(str(tmp_path), config=config)], "train")
        assert file.path.name == "train-00000-of-00001.jsonl"


@pytest.mark.parametrize(
    ("path", "fix"),
    [
        ("https://x.y/z.jsonl", "no address is opened here"),
        ("s3://bucket/z.jsonl", "no address is opened here"),
        ("{}/rows", "write its ending: '{}/rows.jsonl'"),
    ],
)
def test_a_path_that_leads_nowhere_is_answered_with_what_was_meant(path, fix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError) as refused:
        find_files([SourceConfig(path.format("sub"))], "train")
    assert fix.format("sub") in refused.value.problems[0].fix
