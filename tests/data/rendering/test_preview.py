"""`llmtune data preview`: what is shown is what is trained, and nothing in the data can be more than text."""

import itertools
import json
import re

import numpy as np
import pytest

from llmtune.cli.main import run
from llmtune.data.dataset.preview import Group, html_page, json_line, legend, terminal_text
from llmtune.data.example import Conversation, Example, Message, stretches
from llmtune.data.rendering.renderer import Renderer

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def tokenizer(tokenizer_for):
    return tokenizer_for("chatml")


@pytest.fixture
def example(tokenizer):
    def make(*contents, source="rows.jsonl:1", weight=1.0):
        talk = tuple(Message(("user", "assistant")[at % 2], text) for at, text in enumerate(contents))
        rendered = Renderer(tokenizer).render(Conversation(source, talk, loss_weight=weight))
        return Example(source, np.array(rendered.input_ids, np.int32), np.array(rendered.weights, np.float32))

    return make


def test_a_json_line_is_an_object_of_the_four_documented_fields(tokenizer, example):
    shown_example = example("Hi", "naïve 🙂")
    line = json_line(shown_example, tokenizer)
    assert "\n" not in line
    known = json.loads(line)
    assert list(known) == ["source", "input_ids", "weights", "text"]
    assert known["source"] == "rows.jsonl:1"
    assert known["input_ids"] == shown_example.input_ids.tolist()
    assert known["weights"] == shown_example.weights.tolist()
    assert known["text"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nnaïve 🙂<|im_end|>\n"


@pytest.mark.parametrize("family", ["chatml", "llama2", "mistral1", "gemma", "qwen3", "nemotron"])
def test_the_stretches_of_a_row_are_its_whole_text_in_order(family, tokenizer_for):
    tokenizer = tokenizer_for(family)
    rendered = Renderer(tokenizer).render(
        Conversation("r:1", (Message("user", "Grüße 東京 🙂"), Message("assistant", "  two words 🚀")))
    )
    shown_example = Example("r:1", np.array(rendered.input_ids, np.int32), np.array(rendered.weights, np.float32))
    shown = list(stretches(shown_example, tokenizer))
    assert "".join(part.text for part in shown) == tokenizer.decode(rendered.input_ids)
    assert any(part.is_control and part.weight for part in shown)
    assert not any(left[1:] == right[1:] for left, right in itertools.pairwise(shown))


def test_trained_text_is_marked_with_colour_or_with_brackets(tokenizer, example):
    group = Group([example("Hi", "Hello there")])
    plain = "\n".join(terminal_text(group, tokenizer, color=False))
    assert "assistant↵\n⟦Hello there⟧⟦<|im_end|>⟧↵" in plain
    assert plain.startswith("rows.jsonl:1: ")
    coloured = "\n".join(terminal_text(group, tokenizer, color=True))
    # 4: underlined, for those to whom green and cyan are one colour.
    assert "\x1b[4;32mHello there\x1b[0m\x1b[1;4;32m<|im_end|>\x1b[0m↵" in coloured
    assert "\x1b[36m<|im_start|>\x1b[0muser" in coloured
    assert ANSI.sub("", coloured) == plain.replace("⟦", "").replace("⟧", "")
    assert "trained" in legend(color=True)
    assert "⟦trained⟧" in legend(color=False)


def test_weights_other_than_1_are_shown(tokenizer, example):
    text = "\n".join(terminal_text(Group([example("Hi", "Hello", weight=0.5)]), tokenizer, color=False))
    assert "⟦×0.5 Hello⟧" in text
    assert "by weight)" in text


def test_a_pack_is_shown_with_its_borders(tokenizer, example):
    rows = [example("Hi", "Hello"), example("A", "B", source="rows.jsonl:2")]
    text = "\n".join(terminal_text(Group(rows, number=3, capacity=64), tokenizer, color=False))
    assert text.startswith(f"╭── pack 3: 2 rows, {sum(map(len, rows))} of 64 tokens")
    assert "├── rows.jsonl:1: " in text
    assert "├── rows.jsonl:2: " in text
    assert text.endswith("╰──")
    assert "more" not in text
    first = "\n".join(terminal_text(Group(rows, number=3, capacity=64), tokenizer, color=False, rows=1))
    assert first.startswith(text[: text.index("├── rows.jsonl:2")])
    assert first.endswith("├── and 1 more (--all shows them)\n╰──")
    assert "rows.jsonl:2" not in first


def test_data_cannot_steer_the_terminal_or_the_page(tokenizer, example):
    """Nobody let in: escape sequences and markup in a row are shown, not obeyed."""
    bad = example("\x1b[2J\x07<script>alert(1)</script>", '"><img src=x onerror=alert(1)>\u202e', source="<b>x</b>:1")
    text = "\n".join(terminal_text(Group([bad]), tokenizer, color=False))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert r"\x1b[2J" in text
    page = html_page([Group([bad], 1, 64)], tokenizer, title="<i>t</i>")
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>x" not in page
    assert "<i>t" not in page
    assert not re.search(r"(?:src|href)=", page.replace("src=x onerror=alert", ""))


def test_the_page_marks_what_is_trained(tokenizer, example):
    page = html_page([Group([example("Hi", "Hello there")])], tokenizer, title="rows")
    assert '<span class="t">Hello there</span><span class="t c">&lt;|im_end|&gt;</span>' in page


@pytest.fixture
def config(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [
        {"messages": [{"role": "user", "content": f"a {at}"}, {"role": "assistant", "content": f"b {at}"}]}
        for at in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "here.yaml"
    file.write_text(
        f"model: {{name: custom-nano, tokenizer: {tmp_path / 'tokenizer'}}}\n"
        f"data: {{train: [{tmp_path / 'rows.jsonl'}], max_length: 64, cache_dir: {tmp_path / 'cache'}, num_workers: 1}}\n"
    )
    return file


def test_the_command_prints_one_object_a_row(config, capsys):
    assert run(["data", "preview", "--config", str(config), "--all", "--json"], debug=False) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["source"].rsplit(":", 1)[1] for line in lines] == [str(at) for at in range(1, 9)]
    assert all(len(line["input_ids"]) == len(line["weights"]) for line in lines)


def test_the_command_shows_as_many_rows_as_asked_and_packs_when_packing(config, capsys):
    assert run(["data", "preview", "--config", str(config), "--count", "2"], debug=False) == 0
    assert capsys.readouterr().out.count(" trained\n") == 2
    assert run(["data", "preview", "--config", str(config), "--count", "1", "data.packing=greedy"], debug=False) == 0
    assert capsys.readouterr().out.startswith("╭── pack 1: ")


def test_the_command_writes_a_page(config, tmp_path, capsys):
    assert run(["data", "preview", "--config", str(config), "--html", str(tmp_path / "page.html")], debug=False) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "page.html").read_text().count("<pre>") == 5
