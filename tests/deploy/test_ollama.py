"""A Modelfile gives the prompts of training, id for id, or it is not written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmtune.cli.main import run
from llmtune.deploy import ollama
from llmtune.deploy.export import export
from llmtune.deploy.ollama import CONVERSATIONS, modelfile, modelfile_prompt
from llmtune.errors import ModelError, UsageError
from llmtune.models.gguf import read_gguf
from llmtune.models.save import PromptDefaults, write_prompt_defaults
from llmtune.models.tokenizer_training import train_tokenizer

TEMPLATES = Path(__file__).parents[1] / "data" / "rendering" / "templates"
THINKER = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the user asks and the assistant answers", "12 and 345 are numbers"] * 4, 290)


@pytest.fixture
def written(tokenizer):
    def write(template, defaults=PromptDefaults(), **options):  # noqa: B008 - frozen
        path = TEMPLATES / f"{template}.jinja"
        tokenizer.chat_template = path.read_text(encoding="utf-8") if path.is_file() else template
        options = {"file": "m.gguf", "stop_token_ids": [2], "adds_bos": False, **options}
        return modelfile(tokenizer, defaults, **options)

    return write


@pytest.mark.parametrize("name", ["chatml", "smol", "gemma", "granite", "phi4", "qwen3", "mistral1", "deepseek"])
def test_the_prompt_has_the_ids_that_transformers_gives(tokenizer, written, name):
    defaults = PromptDefaults(template_args={"enable_thinking": False})
    text = written(name, defaults)
    for messages in CONVERSATIONS.values():
        if name in ("gemma", "mistral1") and messages[0][0] == "system":
            continue  # the template takes no system prompt
        chat = [{"role": role, "content": content} for role, content in messages]
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False)["input_ids"]
        assert tokenizer.encode(modelfile_prompt(text, messages), add_special_tokens=False) == expected


def test_the_system_prompt_and_the_template_arguments_of_training_are_in_it(written):
    text = written("qwen3", PromptDefaults('Be "kind".\n', {"enable_thinking": False}))
    assert 'SYSTEM """Be "kind".\n"""\n' in text
    prompt = modelfile_prompt(text, (("user", "Hi"),))
    assert prompt.startswith('<|im_start|>system\nBe "kind".\n<|im_end|>')
    assert prompt.endswith(THINKER)


def test_a_first_token_that_ollama_adds_is_not_written_again(tokenizer, written):
    bos = "{{ '<|im_start|>' }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}>"
    tokenizer.bos_token = "<|im_start|>"
    try:
        one, two = written(bos, adds_bos=True), written(bos, adds_bos=False)
    finally:
        tokenizer.bos_token = None
    question = (("user", "Hi"),)
    assert modelfile_prompt(two, question) == "<|im_start|>" + modelfile_prompt(one, question)


def test_it_is_read_as_ollama_reads_it(written):
    """What Ollama v0.32.7 makes of this file, by its own code: quoted texts, and characters that it drops."""
    text = written('{% for m in messages %}a{{ \'{{\' }}\u200d """ {{ m.role }}\t{{ m.content }}!{% endfor %}>')
    template = re.search(r'TEMPLATE """(.*?)"""\n', text, re.DOTALL)[1]
    assert template.startswith('{{ if .System }}a{{ "{{" }}{{ "\\u200d" }} {{ "\\"\\"\\"" }} system{{ "\\u0009" }}')
    assert modelfile_prompt(text, (("user", "x"),)) == 'a{{\u200d """ user\tx!>'
    assert modelfile_prompt('TEMPLATE """a\u200db{{ .System }}"""\n', (("system", "x"),)) == "abx"


@pytest.mark.parametrize(
    ("template", "defaults", "reason"),
    [
        ("mistral3", PromptDefaults(), "does not say what the chat template writes for several turns"),
        ("llama31", PromptDefaults(), "writes the date of today"),
        ("chatml", PromptDefaults(continues_text=True), "this model continues plain texts"),
        ("chatml", PromptDefaults("a\u200db"), r"cannot hold the system prompt of training \(U\+200D\)"),
        ("chatml", PromptDefaults('a """ b'), "cannot hold the system prompt of training"),
        ("{{ messages[0].content }}", PromptDefaults(), "does not write each message once"),
    ],
)
def test_what_cannot_be_made_equal_is_refused_with_the_way_out(written, template, defaults, reason):
    with pytest.raises(ModelError, match=rf"(?s){reason}.*use --to gguf"):
        written(template, defaults)


@pytest.mark.parametrize("lost", ["\n", "<|im_end|>", "{{ else }}"])
def test_a_template_that_is_wrong_anywhere_is_refused(written, monkeypatch, lost):
    """A mutant of what is learnt."""
    learn = ollama._learn
    monkeypatch.setattr(ollama, "_learn", lambda write, bos: learn(write, bos=bos).replace(lost, "", 1))
    with pytest.raises((ModelError, ValueError), match=r"does not say what|is not of this part"):
        written("smol")


def test_the_folder_holds_what_ollama_needs(make, tmp_path, capsys):
    make.tokenizer = train_tokenizer(["the user asks and the assistant answers"] * 4, 290)
    base, out = make.base(), tmp_path / "Bot"
    write_prompt_defaults(base, PromptDefaults("Be kind."))
    assert run(["export", str(base), "--to", "ollama", "--type", "q8_0", "--output", str(out)]) == 0
    said = capsys.readouterr().err
    assert {path.name for path in out.iterdir()} >= {"Modelfile", "model.gguf", "export_report.json"}
    assert f"  ollama create bot -f {out}/Modelfile && ollama run bot  # Ollama\n" in said
    assert "a text that spells a control token is that token" in said
    assert "cannot hold what stood around" not in said
    text = (out / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    (tmp_path / "nothing").mkdir()
    written = read_gguf(out / "model.gguf", tmp_path / "nothing")[1]
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "the user asks"}]
    expected = AutoTokenizer.from_pretrained(base).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert written.encode(modelfile_prompt(text, (("user", "the user asks"),)), add_special_tokens=False) == expected


def test_a_refused_modelfile_leaves_no_folder(make, tmp_path):
    make.tokenizer = train_tokenizer(["the user asks and the assistant answers"] * 4, 290)
    make.tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ModelError, match="does not write each message once"):
        export(str(make.base()), tmp_path / "out", file_format="ollama")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"(?s)--to ollama does not go with the output .*name a folder"):
        export("x", tmp_path / "out.gguf", file_format="ollama")
