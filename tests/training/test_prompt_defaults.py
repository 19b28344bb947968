"""What training puts around each prompt goes with the model: to its run, its adapter, its merge and its export."""

import io
import json
import shutil

import pytest

from chat_templates import CHATML
from llmtune.cli.main import main
from llmtune.data.example import Message
from llmtune.deploy.export import export
from llmtune.deploy.merge import merge_lora
from llmtune.errors import ModelError
from llmtune.evaluation.inference_model import load_inference_model
from llmtune.models.save import PROMPT_DEFAULTS, PromptDefaults, read_prompt_defaults
from llmtune.training import train as training

LORA = ("adapter.method=lora", "adapter.r=2")
FAST = ("training.max_steps=1", "evaluation.every_steps=null", "data.test_size=0")
ANSWERS_BRIEFLY = CHATML.replace(
    "{{ message['content'] }}", "{{ 'brief ' if brief and message['role'] == 'assistant' }}{{ message['content'] }}"
).replace("<|im_start|>assistant\n", "<|im_start|>assistant\n{{ 'brief ' if brief }}")
AROUND = ("data.system=You add.", "data.template_args={brief: true}")


def prompt_of(name, **options):
    loaded = load_inference_model(str(name), no_cuda=True, **options)
    return loaded.tokenizer.decode(loaded.renderer.prompt_ids([Message("user", "hi")]))


def prompt_typed(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main([*map(str, words), "--no-cuda"])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "brief.jinja"
    path.write_text(ANSWERS_BRIEFLY)
    return f"model.chat_template={path}"


@pytest.mark.parametrize("method", ["LoRA", "full"])
def test_system_prompt_and_template_arguments_go_with_every_form_of_the_result(
    method, config_of, template, tmp_path, capsys
):
    run = training.train(config_of(*FAST, *AROUND, template, *(LORA if method == "LoRA" else ()))).folder
    final = run / "checkpoints" / "final"
    expected = prompt_of(run)
    assert "system\nYou add." in expected
    assert expected.endswith("assistant\nbrief ")
    forms = [final, tmp_path / "copied", tmp_path / "exported"]
    shutil.copytree(final, forms[1])  # away from its run
    export(str(run), forms[2])
    if method == "LoRA":
        merge_lora(forms[1], tmp_path / "merged")
        export(str(tmp_path / "merged"), tmp_path / "again")
        forms += [tmp_path / "merged", tmp_path / "again"]
    for form in forms:
        assert prompt_of(form) == expected
        card = (form / "README.md").read_text()
        assert 'system prompt "You add.", template arguments {"brief": true}' in card
    # A run that starts from it with other prompts says so.
    lines = []
    training.train(config_of(*FAST, f"model.name={forms[2]}", name="next"), print_line=lines.append)
    assert any('exported was trained with system prompt "You add."' in line for line in lines)
    # What is typed comes before what was trained.
    assert prompt_of(forms[2], template_args={"brief": False}) == expected.removesuffix("brief ")
    code, _, err = prompt_typed(capsys, "generate", forms[2], "hi", "--max-new-tokens", 1)
    assert code == 0
    assert 'prompts are written with: system prompt "You add.", template arguments {"brief": true}' in err


def test_a_model_of_plain_texts_continues_texts_wherever_it_is(config_of, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"a text of number {number}"}) + "\n" for number in range(8)))
    run = training.train(config_of(*FAST, f"data.train={rows}")).folder
    export(str(run), tmp_path / "exported")
    assert load_inference_model(str(run), no_cuda=True).answers_text
    assert load_inference_model(str(tmp_path / "exported"), no_cuda=True).answers_text


def test_a_plain_chat_has_no_such_file(config_of):
    assert not (training.train(config_of(*FAST)).folder / "checkpoints" / "final" / PROMPT_DEFAULTS).exists()


@pytest.mark.parametrize("command", ["generate", "chat", "predict", "evaluate", "compare"])
def test_arguments_that_the_template_does_not_read_are_named(
    command, tiny_model_folder, rows_file, template, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    (model / "chat_template.jinja").write_text(ANSWERS_BRIEFLY)
    more = {
        "predict": ("--data", rows_file, "--max-new-tokens", 1, "--only-wrong"),
        "evaluate": ("--data", rows_file),
        "compare": (model, "hi", "--max-new-tokens", 1),
        "generate": ("hi", "--max-new-tokens", 1),
        "chat": ("--max-new-tokens", 1),
    }[command]
    code, _, err = prompt_typed(capsys, command, model, *more, "--template-args", "{breif: true}")
    assert code == 0
    assert "note: the chat template does not read the argument `breif`; did you mean `brief`?" in err


@pytest.mark.parametrize("text", ["brief", "[brief]", "{messages: []}"])
def test_template_args_that_are_none_are_refused_under_the_name_of_the_option(text, tiny_model_folder, capsys):
    code, _, err = prompt_typed(capsys, "generate", tiny_model_folder, "hi", "--template-args", text)
    assert code == 2
    assert "where: --template-args" in err


def test_a_config_with_arguments_that_the_template_does_not_read_says_so(config_of):
    lines = []
    training.train(config_of(*FAST, "data.template_args={enable_thinking: false}"), print_line=lines.append)
    assert "data.template_args = not used: the chat template does not read the argument `enable_thinking`" in (
        line.strip() for line in lines
    )


@pytest.mark.parametrize("content", ['{"system": 3}', '{"template_args": []}', "[]", "{"])
def test_a_file_with_other_content_is_refused(content, tmp_path):
    (tmp_path / PROMPT_DEFAULTS).write_text(content)
    with pytest.raises(ModelError):
        read_prompt_defaults(tmp_path)
    (tmp_path / PROMPT_DEFAULTS).write_text('{"system": "S", "later": 1}')
    assert read_prompt_defaults(tmp_path) == PromptDefaults("S")
