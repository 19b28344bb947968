"""The commands that use a result, through the real program."""

import dataclasses
import io
import json
import re
import shlex
import shutil

import pytest
import torch

from llmtune.adapters import attach
from llmtune.adapters.write import write_adapter
from llmtune.cli.main import main
from llmtune.config.schema import AdapterConfig, ModelConfig
from llmtune.models.catalog import resolve
from llmtune.models.load import load_model
from llmtune.models.parameters import trained_parameters


@pytest.fixture
def adapter(request, tmp_path, tiny_tokenizer):
    """An adapter with random weights, as a run writes it; of the tiny model, or of the fixture that a test names."""
    base = str(request.getfixturevalue(getattr(request, "param", "tiny_model_folder")))
    loaded = load_model(
        resolve(base), ModelConfig(name=base), tokenizer=tiny_tokenizer,
        device=torch.device("cpu"), trained="adapter", precision="fp32", seed=0,
    )  # fmt: skip
    adapted, _ = attach.attach_adapter(loaded.model, AdapterConfig(method="lora", r=4), seed=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in trained_parameters(adapted).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(
        adapted,
        folder,
        tokenizer=tiny_tokenizer,
        stop_token_ids=(2,),
        base_digest=loaded.base_digest,
        base_name=base,
    )
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Run one command line; return (exit code, stdout, stderr)."""

    def run_one(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run_one


def answers(out):
    return [json.loads(line)["text"] for line in out.splitlines()]


def test_generate_answers_each_prompt_with_one_json_line(run, tiny_model_folder):
    code, out, err = run("generate", tiny_model_folder, "hello", "a", "--max-new-tokens", "5", "--json")
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["hello", "a"]
    assert all(set(line) == {"prompt", "text", "num_tokens", "stopped_by"} for line in lines)


def test_an_adapter_and_the_model_merged_from_it_give_the_same_answers(run, adapter, tiny_model_folder, tmp_path):
    arguments = ("hello", "the user asks", "--max-new-tokens", "12", "--json")
    code, _, err = run("merge-lora", adapter, "--output", tmp_path / "merged", "--dtype", "float32")
    assert code == 0, err
    tuned = answers(run("generate", adapter, *arguments)[1])
    assert answers(run("generate", tmp_path / "merged", *arguments)[1]) == tuned
    assert answers(run("generate", tiny_model_folder, *arguments)[1]) != tuned


def test_compare_shows_base_and_tuned_of_each_prompt(run, adapter, tiny_model_folder):
    _, out, _ = run("compare", adapter, "hello", "--max-new-tokens", "8", "--json")
    (line,) = [json.loads(line) for line in out.splitlines()]
    base = answers(run("generate", tiny_model_folder, "hello", "--max-new-tokens", "8", "--json")[1])
    tuned = answers(run("generate", adapter, "hello", "--max-new-tokens", "8", "--json")[1])
    assert (line["base"], line["tuned"]) == (base[0], tuned[0])


def test_compare_takes_the_sampling_of_generate(run, adapter):
    sampling = ["--temperature", "1", "--top-k", "9", "--top-p", "0.9", "--seed", "3", "--repetition-penalty", "1.1"]
    arguments = [adapter, "hello", "--max-new-tokens", "8", "--json", *sampling]
    tuned = answers(run("generate", *arguments)[1])[0]
    assert json.loads(run("compare", *arguments)[1])["tuned"] == tuned
    assert tuned != answers(run("generate", *arguments[:5])[1])[0]
    cut = json.loads(run("compare", *arguments, "--stop", tuned[2:4])[1])["tuned"]
    assert (cut, cut in tuned) == (tuned[: tuned.index(tuned[2:4])], True)


def test_a_prompt_that_looks_like_a_path_is_said_to_be_a_prompt(run, adapter, tmp_path):
    (tmp_path / "prompts.txt").write_text("hello\n")
    short = ["--max-new-tokens", "2", "--json"]
    for prompt in (tmp_path / "prompts.txt", tmp_path / "run-that-is-not-there"):
        for command in ("generate", "compare"):
            code, _, err = run(command, adapter, prompt, *short)
            assert code == 0
            assert f"note: `{prompt}` is taken as a prompt; a file of prompts is named with --prompt-file" in err
    for prompt in ("and/or", "hello", "/", "a b/c", "x" * 300 + "/y"):
        assert "is taken as a prompt" not in run("generate", adapter, prompt, *short)[2]


def test_rows_of_a_run_that_are_not_here_have_a_way_out_of_evaluate(run, tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "b", "completion": "c"}\n')
    steps = ("training.max_steps=1", "data.test_size=1", "run.name=r")
    assert run("train", f"model.name={tiny_model_folder}", "data.train=[a.jsonl]", *steps)[0] == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    code, _, err = run("evaluate", tmp_path / "runs" / "r")
    assert code == 3
    assert "there is no file 'a.jsonl'" in err
    assert "start in the folder of the training, or name rows with --data" in err
    assert run("evaluate", tmp_path / "runs" / "r", "--data", tmp_path / "a.jsonl")[0] == 0


def test_an_adapter_whose_base_was_moved_has_a_way_out_of_every_command(run, adapter, tmp_path, tiny_model_folder):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model_folder, moved)
    for path in adapter.glob("*.json"):
        path.write_text(path.read_text().replace(str(tiny_model_folder), str(tmp_path / "gone")))
    answered = ("hello", "--max-new-tokens", "2")
    for command, *rest in (("generate", *answered), ("compare", *answered), ("merge-lora", "--output", "m")):
        code, _, err = run(command, adapter, *rest)
        assert code == 4
        assert "which is not to be found" in err
        (fix,) = re.findall(r"`llmtune (merge-lora .*)`", err)
    words = shlex.split(fix.replace("FOLDER", str(moved)).replace("MERGED", str(tmp_path / "merged")))
    assert run(*words)[0] == 0
    assert run("generate", tmp_path / "merged", *answered)[0] == 0


def test_evaluate_counts_rows_where_a_row_has_several_examples(run, tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": role, "content": "a b"} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair | {"prompt": name}) + "\n" for name in "abc"))
    setup = (f"model.name={tiny_model_folder}", "training.max_steps=1", "data.max_length=64")
    for name, rows, count, more in (
        ("turns", "a.jsonl", 1, "data.one_example_per_turn=true"),
        ("reward", "pairs.jsonl", 3, "objective.method=reward"),
    ):
        code, _, err = run("train", *setup, f"data.train=[{rows}]", more, f"run.name={name}")
        assert code == 0, err
        code, _, err = run("evaluate", tmp_path / "runs" / name, "--data", rows)
        assert code == 0, err
        assert f"{count} held-out rows, measured in" in err


@pytest.mark.parametrize("adapter", ["short_model_folder"], indirect=True)
def test_evaluate_measures_every_row_of_a_file(run, adapter, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps(
                {"messages": [{"role": "user", "content": "the user asks"}, {"role": "assistant", "content": text}]}
            )
            + "\n"
            for text in ("a", "system of words", "0123456789")
        )
    )
    code, out, err = run("evaluate", adapter, "--data", rows, "--json", "--exact-match", "--batch-size", "2")
    assert code == 0, err
    found = json.loads(out)
    assert found["eval_num_answers"] == 3
    assert found["eval_exact_answers"] == 0
    assert 3 < found["eval_mean_nll"] < 12
    assert found["eval_bits_per_byte"] > 0
    again = json.loads(run("evaluate", adapter, "--data", rows, "--json", "--batch-size", "1")[1])
    assert again["eval_mean_nll"] == pytest.approx(found["eval_mean_nll"], rel=1e-6)


def test_a_turn_beyond_the_context_ends_a_piped_chat_and_not_one_at_a_terminal(run, adapter, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stdin, expected in ((Terminal, 0), (io.StringIO, 3)):
        monkeypatch.setattr("sys.stdin", stdin("words " * 300 + "\nhello\n"))
        code, out, err = run("chat", adapter, "--max-new-tokens", "3")
        assert code == expected
        assert "the model sees 256" in err
        assert ("/reset forgets what was said so far" in err) == bool(out.strip()) == (expected == 0)


def test_a_chat_keeps_what_was_said_until_reset(run, adapter, monkeypatch):
    lines = iter(["hello", "hello", "/reset", "hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, out, err = run("chat", adapter, "--max-new-tokens", "6")
    assert code == 0, err
    first, _, third = out.splitlines()
    assert first == third


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("generate", "nowhere-at-all", "hi"), 4, "is no name of `llmtune list-models`"),
        (("merge-lora", "nowhere-at-all", "--output", "x"), 4, "there is no folder `nowhere-at-all`"),
        (("evaluate", "custom-nano", "--data", "a", "--config", "b"), 2, "both name rows"),
        (("generate", "nowhere-at-all", "--prompt-file", "no-such-file"), 2, "the prompts cannot be read"),
    ],
)
def test_what_cannot_be_done_ends_with_its_code_and_one_message(run, arguments, code, problem):
    found, out, err = run(*arguments)
    assert found == code
    assert out == ""
    assert problem in err
    assert "Traceback" not in err


def test_an_adapter_of_another_base_ends_with_code_4_and_leaves_nothing(run, adapter, tmp_path, tiny_model_folder):
    record = json.loads((adapter / "adapter_base.json").read_text())
    (adapter / "adapter_base.json").write_text(json.dumps({**record, "base_digest": "0" * 64}))
    code, _, err = run("merge-lora", adapter, "--output", tmp_path / "merged")
    assert code == 4
    assert "trained on other weights" in err
    assert not (tmp_path / "merged").exists()


def test_the_tuned_model_of_a_whole_run_is_found_and_described(adapter, tmp_path):
    from llmtune.config.dump import config_to_yaml
    from llmtune.config.schema import Config
    from llmtune.evaluation.inference_model import load_inference_model

    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    adapter.rename(folder / "checkpoints" / "final")
    config = dataclasses.replace(Config(), model=ModelConfig(name="smollm2-135m-instruct"))
    (folder / "config.yaml").write_text(config_to_yaml(config))
    (folder / "run.json").write_text(json.dumps({"run_id": "1", "state": "finished"}))
    subject = load_inference_model(str(folder))
    assert subject.is_adapted
    assert subject.config is not None
    assert not subject.answers_text
    assert "final" in subject.description


def test_a_run_remembers_its_system_prompt_and_its_template_arguments(run, adapter, tmp_path, tiny_model_folder):
    from llmtune.config.dump import config_to_yaml
    from llmtune.config.schema import Config, DataConfig
    from llmtune.data.example import Message
    from llmtune.evaluation.inference_model import load_inference_model

    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    final = adapter.rename(folder / "checkpoints" / "final")
    template = "{{ mood or '' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}"
    (final / "chat_template.jinja").write_text(
        template + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    data = DataConfig(system="You add.", template_args={"mood": "kind", "brief": False})
    config = dataclasses.replace(Config(), model=ModelConfig(name=str(tiny_model_folder)), data=data)
    (folder / "config.yaml").write_text(config_to_yaml(config))
    (folder / "run.json").write_text(json.dumps({"run_id": "1", "state": "finished"}))
    subject = load_inference_model(str(folder))
    assert subject.config.data.template_args == {"mood": "kind", "brief": False}
    prompt = subject.tokenizer.decode(subject.renderer.prompt_ids([Message("user", "1+1?")]))
    assert prompt == "kind<|im_start|>system\nYou add.<|im_end|><|im_start|>user\n1+1?<|im_end|><|im_start|>assistant\n"
    own = subject.tokenizer.decode(subject.renderer.prompt_ids([Message("system", "Own."), Message("user", "1+1?")]))
    assert own.startswith("kind<|im_start|>system\nOwn.<|im_end|><|im_start|>user")
    code, out, _ = run("generate", folder, "1+1?", "--max-new-tokens", "2")
    assert code == 0
    assert out
