"""Tokenizers: loaded with what training needs, trained deterministically, known by their digest."""

import json
import random
import shutil
import subprocess
import sys

import pytest

from gguf_families import sentencepiece_tokenizer
from llmtune.config.schema import ArchitectureConfig, ModelConfig
from llmtune.errors import ConfigError, TokenizerError
from llmtune.models.catalog import resolve
from llmtune.models.chat_templates import shipped_chat_templates
from llmtune.models.save import write_tokenizer
from llmtune.models.tokenizer import (
    load_tokenizer,
    load_tokenizer_folder,
    tokenizer_digest,
    train_tokenizer,
    train_tokenizer_for,
)
from llmtune.models.tokenizer_training import SPECIAL_TOKENS, measure_tokenizer

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "walked",
    "away",
    "12",
    "2024",
    "naïve",
    "日本",
    "emoji 🙂",
    "\t",
    "\n\n",
]
TEXTS = [" ".join(random.Random(seed).choices(WORDS, k=30)) for seed in range(200)]


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    copy = tmp_path / "tokenizer"
    shutil.copytree(tiny_model_folder, copy)
    return copy


def open_it(folder, new_tokens=(), **settings):
    config = ModelConfig(name=str(folder), **settings)
    return load_tokenizer(resolve(config.name), config, new_tokens=new_tokens)


def change(folder, drop_template=False, **values):
    path = folder / "tokenizer_config.json"
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    if drop_template:
        (folder / "chat_template.jinja").unlink()


def test_a_tokenizer_with_everything_is_taken_as_it_is(folder):
    loaded = open_it(folder)
    assert loaded.decisions == ()
    assert "<|im_start|>" in loaded.tokenizer.chat_template
    assert loaded.tokenizer.is_fast


def test_the_digest_knows_vocabulary_template_and_special_tokens_but_not_padding(folder):
    first = open_it(folder)
    assert first.digest == open_it(folder).digest
    first.tokenizer(["a", "bb"], padding=True, truncation=True, max_length=8)  # leaves its traces in the tokenizer
    assert tokenizer_digest(first.tokenizer) == first.digest
    assert open_it(folder, chat_template="turns").digest != first.digest
    assert open_it(folder, new_tokens=["<new>"]).digest != first.digest
    change(folder, eos_token="<|endoftext|>")
    assert open_it(folder).digest != first.digest


def test_a_saved_tokenizer_is_the_same_tokenizer(folder, tmp_path):
    loaded = open_it(folder)
    target = tmp_path / "saved"
    target.mkdir()
    write_tokenizer(loaded.tokenizer, target)
    assert load_tokenizer_folder(target).digest == loaded.digest
    assert (
        not {"is_local", "local_files_only", "name_or_path"}
        & json.loads((target / "tokenizer_config.json").read_text()).keys()
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_a_saved_llama_tokenizer_treats_spaces_as_before(tmp_path, legacy):
    """transformers saves it without `legacy`, by which it puts a space after control tokens too, or does not."""
    for name in ("given", "saved"):
        (tmp_path / name).mkdir()
    sentencepiece_tokenizer(["one two, one three"] * 4).save_pretrained(tmp_path / "given")
    change(tmp_path / "given", tokenizer_class="LlamaTokenizer", legacy=legacy)
    given = load_tokenizer_folder(tmp_path / "given")
    write_tokenizer(given.tokenizer, tmp_path / "saved")
    saved = load_tokenizer_folder(tmp_path / "saved")
    assert saved.digest == given.digest
    ids = given.tokenizer.encode("a</s>b")
    assert saved.tokenizer.encode("a</s>b") == ids
    assert given.tokenizer.decode(ids[-2:-1]) == ("" if legacy else "</s>")


def test_of_several_templates_the_default_and_the_one_for_tools_are_kept_and_saved(folder, tmp_path):
    """Rows with tools get what `apply_chat_template` takes for them; the final tokenizer carries both."""
    template = "{% for m in messages %}{{ m.content }}{{ 'T' if tools }}<|im_end|>{% endfor %}"
    several = [{"name": name, "template": name + template} for name in ("default", "rag", "tool_use")]
    change(folder, drop_template=True, chat_template=several)
    loaded = open_it(folder)
    assert set(loaded.tokenizer.chat_template) == {"default", "tool_use"}
    assert "tool_use" in str(loaded.decisions[0])
    target = tmp_path / "saved"
    target.mkdir()
    write_tokenizer(loaded.tokenizer, target)
    again = load_tokenizer_folder(target)
    assert again.digest == loaded.digest
    talk, tool = (
        [{"role": "user", "content": "a"}],
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}},
    )
    assert again.tokenizer.apply_chat_template(talk, tokenize=False) == "defaulta<|im_end|>"
    assert again.tokenizer.apply_chat_template(talk, tools=[tool], tokenize=False) == "tool_useaT<|im_end|>"


def test_a_shipped_template_is_taken_by_name_and_any_other_from_a_file(folder, tmp_path):
    assert set(shipped_chat_templates()) == {"chatml", "turns", "dialogpt"}
    assert open_it(folder, chat_template="turns").tokenizer.chat_template == shipped_chat_templates()["turns"]
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    assert (
        open_it(folder, chat_template=str(tmp_path / "mine.jinja")).tokenizer.chat_template
        == "{{ messages[0].content }}"
    )
    with pytest.raises(TokenizerError, match=r"(?s)`chatlm` is no readable file.*did you mean `chatml`"):
        open_it(folder, chat_template="chatlm")


CHATML_PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("name", "whole", "prompt"),
    [
        (
            "chatml",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "turns",
            "### user\nHi<|im_end|>\n### assistant\nHello<|im_end|>\n",
            "### user\nHi<|im_end|>\n### assistant\n",
        ),
        ("dialogpt", "Hi<|im_end|>Hello<|im_end|>", "Hi<|im_end|>"),
    ],
)
def test_q5_a_shipped_template_asks_for_an_answer_with_a_prefix_of_what_it_trains_on(folder, name, whole, prompt):
    tokenizer = open_it(folder, chat_template=name).tokenizer
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == whole
    assert tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True) == prompt
    assert whole.startswith(prompt)


def test_a_tokenizer_without_a_template_gets_one_and_says_so(folder):
    change(folder, drop_template=True)
    decision = open_it(folder).decisions[0]
    assert (decision.key, decision.value) == ("model.chat_template", "chatml")


def test_chatml_without_its_tokens_is_refused_and_train_tokens_adds_them(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300, chat_template=None)
    folder = tmp_path / "plain"
    folder.mkdir()
    content = json.loads(tokenizer.backend_tokenizer.to_str().replace("<|im_", "<|other_"))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    config = ModelConfig(name="custom-nano", tokenizer=str(folder), chat_template="chatml")
    with pytest.raises(
        TokenizerError, match=r"(?s)has no such token.*adapter.train_tokens=\[<\|im_start\|>,<\|im_end\|>\]"
    ):
        load_tokenizer(resolve("custom-nano"), config)
    loaded = load_tokenizer(resolve("custom-nano"), config, new_tokens=("<|im_start|>", "<|im_end|>"))
    assert len(loaded.tokenizer.encode("<|im_start|>", add_special_tokens=False)) == 1
    assert loaded.decisions[0].key == "adapter.train_tokens"
    plain = load_tokenizer(resolve("custom-nano"), ModelConfig(name="custom-nano", tokenizer=str(folder)))
    assert [one.value for one in plain.decisions if one.key == "model.chat_template"] == ["turns"]


def test_a_missing_pad_token_is_chosen_without_growing_the_vocabulary(folder):
    size = len(open_it(folder).tokenizer)
    change(folder, pad_token=None)
    loaded = open_it(folder)
    assert loaded.tokenizer.pad_token == "<|endoftext|>"
    assert len(loaded.tokenizer) == size
    assert loaded.decisions[0].key == "pad token"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}', "{" * 50]
)
def test_a_damaged_tokenizer_is_one_clear_error(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"cannot be read|has no fast form"):
        open_it(folder)


def test_a_folder_without_a_tokenizer_and_a_scratch_model_without_one_say_so(tmp_path):
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        load_tokenizer(resolve("custom-nano"), ModelConfig(name="custom-nano", tokenizer=str(tmp_path)))
    with pytest.raises(TokenizerError, match=r"(?s)no tokenizer of its own.*llmtune tokenizer train"):
        load_tokenizer(resolve("custom-nano"), ModelConfig(name="custom-nano"))


def test_a_trained_tokenizer_gives_back_10_000_random_unicode_strings_exactly():
    tokenizer = train_tokenizer(TEXTS, 400)
    rng = random.Random(0)
    ranges = [(0, 0x7F), (0, 0x7F), (0x80, 0x24F), (0x370, 0xD7FF), (0xE000, 0xFFFF), (0x1_0000, 0x10_FFFF)]
    strings = ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 24))) for _ in range(10_000)]
    assert measure_tokenizer(tokenizer, strings).round_trip_failures == 0


def test_a_trained_tokenizer_has_the_size_asked_for_and_its_special_tokens_first():
    tokenizer = train_tokenizer(TEXTS, 300, special_tokens=["<tool>"])
    assert len(tokenizer) == 300
    assert [tokenizer.convert_tokens_to_ids(one) for one in (*SPECIAL_TOKENS, "<tool>")] == [0, 1, 2, 3, 4]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert [len(tokenizer.encode(one)) for one in ("<|im_end|>", "<tool>", "2024")] == [1, 1, 4]


def test_the_report_counts_what_it_says():
    tokenizer = train_tokenizer(
        ["ab ab ab ab"], 262, min_frequency=1
    )  # 256 bytes, 4 special tokens, 2 merges: `ab` and ` ab`
    report = measure_tokenizer(tokenizer, ["ab ab", "é"])
    assert (report.vocab_size, report.texts, report.num_bytes, report.num_tokens) == (262, 2, 7, 4)
    assert report.bytes_per_token == 7 / 4
    assert report.unused_share == (258 - 4) / 258


VOCABULARIES = """
import json, os
from llmtune.models.tokenizer import tokenizer_digest
from llmtune.models.tokenizer_training import train_tokenizer
for threads in ("1", "5"):
    if os.fork() == 0:  # the number is read once, where the first thread is needed
        os.environ["RAYON_NUM_THREADS"] = threads
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads != "1" else "false"
        print(tokenizer_digest(train_tokenizer(json.load(open("texts.json")), 400)), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_the_vocabulary_does_not_depend_on_the_number_of_threads(tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    command = [sys.executable, "-c", VOCABULARIES]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=True)
    digests = done.stdout.split()
    assert len(digests) == 2
    assert len({*digests}) == 1


def test_texts_are_streamed():
    seen = []
    train_tokenizer((seen.append(index) or text for index, text in enumerate(TEXTS)), 300)
    assert seen == list(range(200))


def test_no_text_and_too_small_a_vocabulary_are_refused():
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer([], 300)
    with pytest.raises(ConfigError, match=r"(?s)cannot hold the 256 bytes and 4 special tokens.*260 or more"):
        train_tokenizer(TEXTS, 259)


def test_a_scratch_model_without_a_tokenizer_gets_one_trained_on_its_rows():
    config = ModelConfig(name="custom-nano", architecture=ArchitectureConfig(vocab_size=320, max_seq_len=99))
    loaded = train_tokenizer_for(resolve("custom-nano"), config, TEXTS)
    assert len(loaded.tokenizer) == 320
    assert loaded.tokenizer.model_max_length == 99
    assert loaded.tokenizer.chat_template == shipped_chat_templates()["chatml"]
    assert "320 of 320 entries" in str(loaded.decisions[0])
