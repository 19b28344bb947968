"""Answers as they come, what chat keeps and saves, and what the commands of results measure."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtune.cli.compare_rows import count_wins
from llmtune.cli.conversation import Conversation
from llmtune.cli.main import run
from llmtune.data.example import Message
from llmtune.evaluation.generate import generate
from llmtune.evaluation.heldout import token_accuracy
from llmtune.evaluation.sampling import Sampling
from llmtune.evaluation.streaming import AnswerStream


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stop", [(), ("e", "the user"), ("\u00e9",)])
def test_the_pieces_of_an_answer_add_up_to_it(tiny_model, renderer, tiny_tokenizer, seed, stop):
    """Also where a stop text ends it, and where tokens are parts of a character."""
    pieces, sampling = [], Sampling(temperature=3.0, seed=seed, stop=stop)
    arguments = (tiny_model, tiny_tokenizer, renderer, ["the user asks"])
    (answer,) = generate(*arguments, max_new_tokens=16, sampling=sampling, show=pieces.append)
    assert "".join(pieces) == answer.text
    assert [answer] == generate(*arguments, max_new_tokens=16, sampling=sampling)


def test_a_piece_is_shown_before_the_answer_ends_and_a_possible_stop_text_is_held_back(tiny_tokenizer):
    shown = []
    stream = AnswerStream(tiny_tokenizer, {2}, ("the end",), shown.append)
    stream.put(torch.tensor([[5, 6, 7]]))  # the prompt
    ids = tiny_tokenizer("a small system of th", add_special_tokens=False)["input_ids"]
    for token in ids:
        stream.put(torch.tensor([token]))
    assert "".join(shown) == "a small system of "
    stream.finish("a small system of the user")
    assert "".join(shown) == "a small system of the user"
    assert len(shown) > 1


def test_chat_forgets_sets_its_system_message_and_saves_a_row_of_training_data(tmp_path):
    talk, file = Conversation("be brief"), tmp_path / "talk.jsonl"
    assert "nothing was said" in talk.obey(f"/save {file}")
    talk.messages += [Message("user", "hi"), Message("assistant", "ho")]
    talk.obey("/system be long")
    file.write_text("not json\n")
    assert "as a row of 3 messages" in talk.obey(f"/save {file}")
    first, row = file.read_text().splitlines()
    assert first == "not json", "what was in the file stays"
    assert [message["content"] for message in json.loads(row)["messages"]] == ["be long", "hi", "ho"]
    talk.obey("/reset")
    assert [message.content for message in talk.messages] == ["be long"]
    talk.obey("/system")
    assert talk.messages == []
    assert "no command `/rest`" in talk.obey("/rest")
    assert talk.obey(f"/save {tmp_path}").startswith(("nothing", "not saved"))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = [("the user asks", "a"), ("hello", "system of words"), ("a", "0123456789")]
    lines = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in messages]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recomputed(folder, renderer, rows):
    """Per row (nats, trained tokens, right tokens) in NumPy float64."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    for line in map(json.loads, rows.read_text().splitlines()):
        messages = [Message(**message) for message in line["messages"]]
        prompt = renderer.prompt_ids(messages[:-1])
        answer = renderer.tokenizer(messages[-1].content, add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer, 2]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
        logits -= logits.max(-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = range(len(prompt), len(ids))
        nats = -sum(log_probabilities[place - 1, ids[place]] for place in places)
        found.append((nats, len(places), sum(log_probabilities[place - 1].argmax() == ids[place] for place in places)))
    return np.array(found)


def test_perplexity_and_token_accuracy_of_the_command_are_those_of_numpy(tiny_model_folder, renderer, rows, capsys):
    command = ["evaluate", str(tiny_model_folder), "--data", str(rows), "--json", "--token-accuracy"]
    assert run(command) == 0
    measured = json.loads(capsys.readouterr().out)
    nats, tokens, right = recomputed(tiny_model_folder, renderer, rows).sum(axis=0)
    assert measured["eval_num_loss_tokens"] == tokens
    assert measured["eval_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert measured["eval_token_accuracy"] == right / tokens


def test_token_accuracy_counts_each_trained_token_once(tiny_model, held_out):
    right = count = 0
    for example in held_out:
        with torch.no_grad():
            guess = (
                tiny_model(input_ids=torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0].argmax(-1)
            )
        trained = example.weights[1:] != 0
        right += int((guess.numpy()[:-1] == example.input_ids[1:])[trained].sum())
        count += int(trained.sum())
    assert token_accuracy(tiny_model, held_out, pad_id=0) == right / count


def test_the_win_table_counts_rows_by_their_own_loss():
    nan = math.nan
    table = count_wins(np.array([1.0, 2.0, 3.0, 5.0, nan]), np.array([1.5, 1.0, 3.00001, 4.0, 1.0]))
    assert (table.rows, table.first_better, table.second_better, table.equal) == (4, 1, 2, 1)


def test_a_model_compared_with_itself_is_equal_on_every_row(tiny_model_folder, renderer, rows, capsys):
    name = str(tiny_model_folder)
    assert run(["compare", name, name, "--data", str(rows), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    losses = recomputed(tiny_model_folder, renderer, rows)
    assert (table["rows"], table["equal"]) == (3, 3)
    assert table["first_mean"] == pytest.approx((losses[:, 0] / losses[:, 1]).mean(), rel=1e-5)
    assert run(["compare", name, name, "--data", str(rows)]) == 0
    assert "better on 0 (0%)" in capsys.readouterr().out
