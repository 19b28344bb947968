"""Rows that judge answers: every shape of a pair is read alike, its prompt is what `generate` would be given, and its
answer with the end-of-turn token is all that is trained (Q4, Q5, Q6).
"""

import dataclasses
import json

import numpy as np
import pytest

from llmtune.data.dataset.batches import BatchPlan, eval_batches
from llmtune.data.dataset.make_dataset import iter_texts, prepare_data, survey_data
from llmtune.data.dataset.micro_batch import split_group
from llmtune.data.dataset.overlong import cut_sides
from llmtune.data.dataset.packing import examples_together, plan_sequences
from llmtune.data.dataset.row_result import conversations_of
from llmtune.data.example import Message, Row
from llmtune.data.rows.preferences import RECOGNIZED_BY, right_answer
from llmtune.data.rows.row_fields import UnusableRowError
from llmtune.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


PROMPT = (Message("user", "2+3?", 0.0),)
SHAPES = {
    "trl, text": {"prompt": "2+3?", "chosen": "5", "rejected": "6"},
    "trl, explicit prompt": {"prompt": [user("2+3?")], "chosen": [assistant("5")], "rejected": [assistant("6")]},
    "trl, implicit prompt": {"chosen": [user("2+3?"), assistant("5")], "rejected": [user("2+3?"), assistant("6")]},
    "text prompt, repeated": {
        "prompt": "2+3?",
        "chosen": [user("2+3?"), assistant("5")],
        "rejected": [user("2+3?"), assistant("6")],
    },
    "text prompt, messages": {"prompt": "2+3?", "chosen": [assistant("5")], "rejected": [assistant("6")]},
    "prompt as messages, text": {"prompt": [user("2+3?")], "chosen": "5", "rejected": "6"},
    "content in parts": {
        "prompt": [user([{"type": "text", "text": "2+3?"}])],
        "chosen": [assistant([{"type": "text", "text": "5"}])],
        "rejected": [assistant(["6"])],
    },
    "llama-factory, alpaca": {"instruction": "2+3?", "input": "", "chosen": "5", "rejected": "6"},
    "llama-factory, sharegpt": {
        "conversations": [human("2+3?")],
        "chosen": {"from": "gpt", "value": "5"},
        "rejected": {"from": "gpt", "value": "6"},
    },
    "axolotl, argilla": {"instruction": "2+3?", "chosen_response": "5", "rejected_response": "6"},
    "axolotl, intel": {"question": "2+3?", "chosen": "5", "rejected": "6", "system": ""},
    "axolotl, icr": {"input": "2+3?", "chosen": "5", "rejected": "6"},
}


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_every_shape_of_a_pair_is_the_same_two_conversations(fields):
    chosen, rejected = conversations_of(Row("f:1", fields), "preference")
    assert (chosen.messages, rejected.messages) == (
        (*PROMPT, Message("assistant", "5")),
        (*PROMPT, Message("assistant", "6")),
    )
    assert (chosen.side, rejected.side, chosen.unused) == ("chosen", "rejected", ())
    # As in prompt-completion rows, a text under `prompt` with texts is one text.
    assert chosen.prompt_is_text == all(isinstance(fields.get(name), str) for name in ("prompt", "chosen"))


def test_a_system_message_may_stand_before_a_prompt_that_is_given_again_as_text():
    turns = [{"role": "system", "content": "Add."}, user("2+3?")]
    fields = {"prompt": "2+3?", "chosen": [*turns, assistant("5")], "rejected": [*turns, assistant("6")]}
    chosen, _ = conversations_of(Row("f:1", fields), "preference")
    assert [message.role for message in chosen.messages] == ["system", "user", "assistant"]
    history = {"instruction": "b", "input": "c", "history": [["q", "a"]], "system": "s", "chosen": "5", "rejected": "6"}
    chosen, _ = conversations_of(Row("f:1", history), "preference")
    assert [message.content for message in chosen.messages] == ["s", "q", "a", "b\n\nc", "5"]


UNPAIRED = {
    "trl, text": {"prompt": "2+3?", "completion": "5", "label": True},
    "trl, messages": {"prompt": [user("2+3?")], "completion": [assistant("5")], "label": True},
    "mixed": {"prompt": "2+3?", "completion": [assistant("5")], "label": True},
    "mixed the other way": {"prompt": [user("2+3?")], "completion": "5", "label": 1},
    "llama-factory, alpaca": {"instruction": "2+3?", "input": "", "output": "5", "kto_tag": True},
    "llama-factory, messages": {"messages": [user("2+3?"), assistant("5")], "label": "true"},
    "llama-factory, sharegpt": {
        "conversations": [human("2+3?"), {"from": "gpt", "value": "5"}],
        "kto_tag": True,
    },
}


@pytest.mark.parametrize("fields", UNPAIRED.values(), ids=UNPAIRED)
def test_every_shape_of_a_labelled_answer_is_the_same_conversation(fields):
    (conversation,) = conversations_of(Row("f:1", fields), "unpaired")
    assert [(message.role, message.content) for message in conversation.messages] == [
        ("user", "2+3?"),
        ("assistant", "5"),
    ]
    assert conversation.side == "desirable"
    assert conversation.unused == ()
    name = "kto_tag" if "kto_tag" in fields else "label"
    (other,) = conversations_of(Row("f:1", {**fields, name: False}), "unpaired")
    assert other.side == "undesirable"


BAD = {
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected", "the two sides are equal"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "prompt", "is missing"),
    "null": ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected", "is null"),
    "two kinds": ({"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}, "rejected", "of two kinds"),
    "empty": ({"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen", "the answer is empty"),
    "other prompts": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("z"), assistant("c")]},
        "chosen",
        "the two sides have different prompts",
    ),
    "a beginning": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b"), user("c")]},
        "chosen",
        "one side is the beginning of the other",
    ),
    "nothing in common": ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "prompt", "no message in common"),
    "weight": ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": 0.5}, "weight", "a weight of 0.5 is not used"),
    "a number": (
        {"prompt": "a", "chosen": 3, "rejected": "c"},
        "chosen",
        "must be text or messages, this is the number 3",
    ),
}


@pytest.mark.parametrize(("fields", "field", "problem"), BAD.values(), ids=BAD)
def test_a_pair_that_cannot_be_compared_is_named_with_its_field(fields, field, problem):
    with pytest.raises(UnusableRowError) as caught:
        conversations_of(Row("f:1", fields), "preference")
    assert caught.value.field == field
    assert problem in caught.value.problem


@pytest.mark.parametrize("label", [None, 2, "good", 0.5])
def test_a_label_is_true_or_false(label):
    with pytest.raises(UnusableRowError) as caught:
        conversations_of(Row("f:1", {"prompt": "a", "completion": "b", "label": label}), "unpaired")
    assert caught.value.field == "label"


def pairs(count):
    """Pairs of different lengths with two turns before the answer."""
    for index in range(count):
        turns = [user(f"q{index}"), assistant("a " * (index % 4)), user(f"r{index}")]
        turns[1]["content"] += "a"
        yield {"prompt": turns, "chosen": [assistant(f"yes {index} " * (1 + index % 3))], "rejected": [assistant("no")]}


def test_prompt_ids_are_those_of_generate_and_only_the_answer_with_its_end_is_trained(write, config, renderer):
    rows = list(pairs(6))
    prepared = prepare_data(config(write("a.jsonl", rows)), renderer, formats=RECOGNIZED_BY["dpo"])
    assert len(prepared.train) == 12
    assert prepared.train.sides.tolist() == [0, 1] * 6
    for number, row in enumerate(rows):
        prompt = renderer.prompt_ids([Message(turn["role"], turn["content"]) for turn in row["prompt"]])
        for side, name in enumerate(("chosen", "rejected")):
            example = prepared.train[2 * number + side]
            assert example.source.endswith(f"a.jsonl:{number + 1}#{name}")
            assert example.side == name
            assert example.input_ids[: len(prompt)].tolist() == prompt
            trained = np.flatnonzero(example.weights)
            assert trained.tolist() == list(range(len(prompt), len(prompt) + len(trained)))
            assert int(example.input_ids[trained[-1]]) in renderer.stop_token_ids
            answer = renderer.vocabulary.decode(example.input_ids[trained].tolist())
            assert answer.startswith(row[name][0]["content"].strip())
    summary = prepared.ledger.summary()["train"]
    assert (summary["input"], summary["used"], summary["pairs"], summary["examples"]) == (6, 6, 6, 12)


def test_the_format_is_told_among_those_the_method_learns_from(write, config, renderer):
    both = write("a.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    for method, name in (("sft", "prompt-completion"), ("kto", "unpaired")):
        prepared = prepare_data(config(both), renderer, formats=RECOGNIZED_BY[method])
        assert [decision.value for decision in prepared.decisions if decision.key == "data.format"] == [name]
    with pytest.raises(DataError, match=r"no row has the fields of a format.*") as caught:
        prepare_data(config(both), renderer, formats=RECOGNIZED_BY["dpo"])
    assert "(preference)" in caught.value.problems[0].fix
    pair = write("b.jsonl", list(pairs(2)))
    assert prepare_data(config(pair), renderer, formats=RECOGNIZED_BY["kto"]).train.sides.tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match="some rows are pairs"):
        examples_together(prepare_data(config(pair, both), renderer, formats=RECOGNIZED_BY["kto"]).train)


def test_policies_for_long_rows_hold_for_the_pair(write, config, renderer):
    short, long = {"prompt": "a", "chosen": "b", "rejected": "c"}, "word " * 60
    path = write("a.jsonl", [short, {"prompt": "a", "chosen": long, "rejected": "c"}])
    with pytest.raises(DataError, match=r"longer than `data\.max_length` of 32 tokens"):
        prepare_data(config(path, max_length=32), renderer, formats=RECOGNIZED_BY["dpo"])
    dropped = prepare_data(config(path, max_length=32, overlong="drop"), renderer, formats=RECOGNIZED_BY["dpo"])
    assert len(dropped.train) == 2
    cut = prepare_data(config(path, max_length=32, overlong="truncate_right"), renderer, formats=RECOGNIZED_BY["dpo"])
    assert cut.train.lengths.tolist()[2] == 32
    (entry,) = cut.ledger.entries
    assert "(chosen): truncate_right" in entry["reason"]
    assert int(cut.train[2].input_ids[-1]) in renderer.stop_token_ids


def test_a_cut_on_the_left_takes_the_same_tokens_off_both_prompts():
    def side(*answer):
        ids = np.array([1, *range(10, 20), *answer], dtype=np.int32)
        weights = np.zeros(len(ids), dtype=np.float32)
        weights[11:] = 1
        return ids, weights

    sides = [side(30, 31, 32, 33), side(40)]
    keep = {"end_token_ids": [33], "bos_token_id": 1}
    cut = cut_sides(sides, max_length=10, policy="truncate_left", **keep)
    assert [ids.tolist() for ids, _ in cut.pieces] == [
        [1, 15, 16, 17, 18, 19, 30, 31, 32, 33][:10],
        [1, 15, 16, 17, 18, 19, 40],
    ]
    assert cut_sides(sides, max_length=4, policy="truncate_left", **keep).pieces == []
    same = [side(30, 31, 32), side(30, 31, 40)]
    assert cut_sides(same, max_length=13, policy="truncate_right", end_token_ids=[], bos_token_id=1).pieces == []


def test_equal_rows_are_duplicates_but_not_the_same_answer_with_the_other_label(write, config, renderer):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, True)]
    prepared = prepare_data(config(write("a.jsonl", rows), on_duplicate="drop"), renderer, formats=RECOGNIZED_BY["kto"])
    assert prepared.ledger.summary()["train"]["duplicate"] == 1
    assert prepared.train.sides.tolist() == [2, 3]


def test_a_pair_with_one_bad_side_is_bad_and_named(write, config, renderer):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    survey = survey_data(config(write("a.jsonl", rows)), renderer, formats=RECOGNIZED_BY["dpo"])
    assert [problem.where.rpartition("/")[2] for problem in survey.problems] == ["a.jsonl:1"]
    assert "rejected: the two sides are equal" in survey.problems[0].problem


@pytest.mark.parametrize("packing", ["none", "greedy", "first_fit", "best_fit"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_both_sides_of_a_pair_lie_in_one_micro_batch(write, config, renderer, packing, layout):
    prepared = prepare_data(config(write("a.jsonl", list(pairs(23)))), renderer, formats=RECOGNIZED_BY["dpo"])
    examples = prepared.train
    packs = plan_sequences(examples, 64, packing, 3)
    assert sorted(np.concatenate(packs).tolist()) == list(range(46))
    assert all(int(examples.lengths[pack].sum()) <= 128 for pack in packs)
    for world_size in (1, 3):
        seen = []
        for rank in range(world_size):
            options = {"shuffle_seed": 5, "epochs": 1, "max_steps": None, "layout": layout, "max_group_tokens": 90}
            plan = BatchPlan(
                examples, packs, batch_size=3, accumulation=2, world_size=world_size, rank=rank, together=2, **options
            )
            for window in plan.windows():
                for batch in window.micro_batches:
                    assert batch.sides == ("chosen", "rejected") * (len(batch.sides) // 2)
                    chosen, rejected = batch.indices[0::2], batch.indices[1::2]
                    assert (chosen + 1 == rejected).all()
                    assert (chosen % 2 == 0).all()
                    seen += batch.indices.tolist()
                assert set(window.indices.tolist()) <= set(window.all_indices.tolist())
        assert sorted(seen) == list(range(46))
    held_out = eval_batches(examples, batch_size=4, layout=layout, pad_id=0, max_group_tokens=90, together=2)
    assert sorted(np.concatenate([batch.indices for batch in held_out]).tolist()) == list(range(46))


def test_trained_tokens_of_each_sequence_are_counted_alike_in_both_layouts(write, config, renderer):
    examples = prepare_data(config(write("a.jsonl", list(pairs(5)))), renderer, formats=RECOGNIZED_BY["dpo"]).train
    counts = [int((example.weights != 0).sum()) for example in examples]
    for layout in ("flat", "padded"):
        (batch,) = eval_batches(examples, batch_size=8, layout=layout, pad_id=0, together=2)
        assert batch.trained_tokens_per_example.tolist() == [counts[index] for index in batch.indices]


def test_groups_of_pairs_are_cut_between_pairs():
    lengths = np.array([5, 4, 9, 9, 1, 1], dtype=np.int64)
    groups = split_group(np.arange(6), lengths, "flat", 18, together=2)
    assert sorted(group.tolist() for group in groups) == [[0, 1, 4, 5], [2, 3]]


def test_texts_for_a_tokenizer_hold_each_prompt_once(write, config):
    path = write("a.jsonl", [{"prompt": "p", "chosen": "b", "rejected": "c"}])
    assert list(iter_texts(config(path), RECOGNIZED_BY["dpo"])) == ["p", "b", "c"]


def test_preview_shows_both_sides_with_their_masks(write, config, renderer, tiny_tokenizer):
    from llmtune.data.dataset.preview import Group, json_line, terminal_text

    examples = prepare_data(config(write("a.jsonl", list(pairs(1)))), renderer, formats=RECOGNIZED_BY["dpo"]).train
    text = "\n".join(terminal_text(Group(list(examples)), tiny_tokenizer, color=False))
    assert "#chosen: " in text
    assert "#rejected: " in text
    assert text.count("⟦") == 4  # each answer, and each end-of-turn token
    assert [json.loads(json_line(example, tiny_tokenizer))["side"] for example in examples] == ["chosen", "rejected"]


# --- prompts whose answers are drawn


RECORD = {"name": "Ada", "age": 36}
PROMPTS = {
    "trl, messages": ({"prompt": [user("2+3?")], "answer": "5"}, "5"),
    "gsm8k": ({"question": "2+3?", "answer": "so #### 5"}, "so #### 5"),
    "a number": ({"instruction": "2+3?", "solution": 5}, "5"),
    "an object": ({"query": "Who?", "ground_truth": RECORD}, json.dumps(RECORD)),
    "a prompt alone": ({"input": "2+3?"}, None),
    "a conversation": ({"messages": [user("2+3?"), assistant("5")]}, "5"),
    "a conversation that ends with the question": ({"conversations": [human("2+3?")]}, None),
    "a pair": ({"prompt": [user("2+3?")], "chosen": [assistant("5")], "rejected": [assistant("6")]}, "5"),
    "messages as completion": ({"prompt": [user("2+3?")], "completion": [assistant("5")]}, "5"),
    "system beside it": ({"system": "Be short.", "question": "2+3?", "answer": "5"}, "5"),
}


@pytest.mark.parametrize(("fields", "answer"), PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_has_the_ids_that_generate_would_give_and_nothing_is_trained(write, config, renderer, fields, answer):
    examples = prepare_data(config(write("a.jsonl", [fields])), renderer, formats=RECOGNIZED_BY["grpo"]).train
    question = next(text for text in ("2+3?", "Who?") if text in json.dumps(fields))
    system = [Message("system", "Be short.")] if "system" in fields else []
    assert examples[0].input_ids.tolist() == renderer.prompt_ids([*system, Message("user", question)])
    assert not examples[0].weights.any()
    assert (examples[0].side, right_answer(Row("a:1", fields))) == ("prompt", answer)


def test_a_bare_text_is_continued_as_it_is(write, config, renderer):
    examples = prepare_data(
        config(write("a.jsonl", [{"prompt": "2+3=", "answer": "5"}])), renderer, formats=RECOGNIZED_BY["grpo"]
    ).train
    assert examples[0].input_ids.tolist() == renderer.text_prompt_ids("2+3=")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"messages": [assistant("5")]}, "nothing stands before the answer"),
        ({"prompt": None, "question": None}, "prompt: is null"),
        ({"prompt": 5}, "must be text or messages"),
    ],
)
def test_a_row_without_a_prompt_is_named(fields, problem):
    with pytest.raises(UnusableRowError) as refusal:
        conversations_of(Row("a:1", fields), "prompt")
    assert problem in f"{refusal.value.field}: {refusal.value.problem}"


def test_a_prompt_that_is_too_long_is_dropped_and_said(write, config, renderer):
    path = write("a.jsonl", [{"question": "2+3?"}, {"question": "word " * 200}])
    settings = dataclasses.replace(config(path), max_length=64, overlong="drop")
    survey = survey_data(settings, renderer, formats=RECOGNIZED_BY["grpo"])
    assert len(survey.train) == 1
    assert survey.ledger.summary()["train"]["dropped"] == 1
