"""Whole runs that train a head of scores: they begin at exactly the loss of equal scores, and what they save gives the
same scores in transformers and peft.
"""

import json
import math

import pytest
import torch

from llmtune.cli.main import run as command
from llmtune.config.dump import config_to_yaml
from llmtune.config.layers import load_config
from llmtune.errors import DataError, UsageError
from llmtune.evaluation.inference_model import load_inference_model
from llmtune.models.read_config import quiet_libraries
from llmtune.training import train as training
from llmtune.training.progress import print_result
from rank_helpers import in_two_ranks
from training_fixtures import WORDS
from training_helpers import FOUR_BIT, LORA, lines_of, stopped_after, weights_of

LN2 = float(-torch.nn.functional.logsigmoid(torch.zeros(())))


def words(start, step, count):
    return " ".join(WORDS[(start + place * step) % len(WORDS)] for place in range(count))


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """16 pairs; every third has a margin."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for index in range(16):
        prompt = [{"role": "user", "content": f"{words(index, 3, 2 + index % 5)} {index}"}]
        sides = {"chosen": words(index * 5, 1, 1 + index % 6), "rejected": words(index * 7, 1, 1 + index % 4) + " no"}
        row = {"prompt": prompt} | {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
        rows.append(row | ({"margin": 0.5} if index % 3 == 0 else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def labels_file(tmp_path_factory):
    """18 rows of three labels, one of them rare."""
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    rows = [{"text": words(at, 2, 1 + at % 4) + f" {at}", "label": 2 if at % 9 == 0 else at % 2} for at in range(1, 19)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def resolve(tiny_model_folder, pairs_file, labels_file, tmp_path):
    """The config of a short run of `method`; further KEY=VALUE on top."""

    def resolve(method, *overrides, name="run"):
        basis = [
            f"model.name={tiny_model_folder}",
            f"data.train={pairs_file if method == 'reward' else labels_file}",
            f"data.cache_dir={tmp_path / 'cache'}",
            "data.num_workers=1",
            "data.test_size=4",
            f"run.output_dir={tmp_path / 'runs'}",
            f"run.name={name}",
            f"objective.method={method}",
            "training.batch_size=2",
            "training.gradient_accumulation_steps=2",
            "training.learning_rate=0.003",
            "training.precision=fp32",
            "training.max_steps=3",
            "tracking.trackers=[jsonl]",
        ]
        return load_config(None, overrides=[*basis, *overrides], environ={})

    return resolve


def scores_of_rows(loaded, texts):
    """Scores of texts in one padded batch by transformers alone, float32 [S, L]."""
    tokenizer, model = loaded
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def own_scores(folder, texts):
    """The same by our own engine, all rows in one flat micro-batch."""
    import numpy as np

    from llmtune.config.schema import Config
    from llmtune.data.dataset.micro_batch import make_micro_batch
    from llmtune.data.example import Example
    from llmtune.engine.forward import build_engine
    from llmtune.engine.precision import Precision

    loaded = load_inference_model(str(folder), no_cuda=True, may_score=True)
    cpu = torch.device("cpu")
    engine = build_engine(loaded.model, config=Config(), device=cpu, precision=Precision("fp32", cpu))
    rows = [np.array(loaded.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in texts]
    examples = [Example("", ids, np.zeros(len(ids), np.float32)) for ids in rows]
    with torch.no_grad():
        assert engine.layout == "flat"
        return engine.scores(make_micro_batch(examples, "flat", 0)), loaded


TEXTS = [words(3, 1, 4), words(5, 2, 9), words(1, 3, 2)]
STARTS = {
    "full": (),
    "lora": LORA,
    "4bit": FOUR_BIT,
    "plain engine": ("training.engine=plain", *LORA),
    "packed bf16": ("data.packing=best_fit", "data.max_length=128", "training.precision=bf16", *LORA),
}


@pytest.mark.campaign
@pytest.mark.parametrize("overrides", STARTS.values(), ids=STARTS)
def test_a_reward_model_begins_at_equal_scores(resolve, overrides):
    """The head is 0: no pair is won, and without a margin the loss is ln 2 to the last bit."""
    run = training.train(resolve("reward", "training.max_steps=1", *overrides)).folder
    evaluation, step = lines_of(run)[:2]
    for line, prefix in ((evaluation, "eval_"), (step, "")):
        assert line[f"{prefix}rewards_chosen"] == line[f"{prefix}rewards_margin"] == line[f"{prefix}accuracy"] == 0.0
    with_margin, count = float(-torch.nn.functional.logsigmoid(torch.tensor(-0.5))), step["num_pairs"]
    possible = [(n * with_margin + (count - n) * LN2) / count for n in range(1, int(count))]
    assert min(abs(step["train_loss"] - value) for value in possible) < 1e-6


@pytest.mark.campaign
@pytest.mark.parametrize("adapter", [(), LORA], ids=["full", "lora"])
def test_a_classifier_begins_at_the_loss_of_a_guess_and_names_its_labels(resolve, adapter):
    said = []
    run = training.train(resolve("classification", *adapter), print_line=said.append).folder
    lines = lines_of(run)
    assert lines[0]["eval_loss"] == pytest.approx(math.log(3), abs=1e-6)
    assert 0 <= lines[-1]["eval_macro_f1"] <= 1
    assert lines[-1]["eval_num_rows"] == 4
    assert (
        sum("an answer of `1` to everything" in line or "an answer of `0` to everything" in line for line in said) == 1
    )
    _, loaded = own_scores(run, TEXTS)
    assert loaded.labels == ("0", "1", "2")


@pytest.mark.campaign
def test_a_saved_model_gives_the_same_scores_in_transformers(resolve):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    for method, units in (("reward", 1), ("classification", 3)):
        final = training.train(resolve(method, name=method)).folder / "checkpoints" / "final"
        ours, _ = own_scores(final, TEXTS)
        assert ours.shape == (3, units)
        assert ours.abs().min() > 0
        loaded = AutoTokenizer.from_pretrained(final), AutoModelForSequenceClassification.from_pretrained(final)
        torch.testing.assert_close(scores_of_rows(loaded, TEXTS), ours, rtol=1e-5, atol=1e-6)
    assert loaded[1].config.id2label == {0: "0", 1: "1", 2: "2"}


def test_an_adapter_gives_the_same_scores_in_peft_and_merged(resolve, tiny_model_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    final = training.train(resolve("classification", *LORA)).folder / "checkpoints" / "final"
    ours, _ = own_scores(final, TEXTS)
    assert json.loads((final / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    tokenizer = AutoTokenizer.from_pretrained(final)
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_folder, num_labels=3, pad_token_id=tokenizer.pad_token_id
    )
    with quiet_libraries():
        adapted = PeftModel.from_pretrained(base, final)
    in_peft = scores_of_rows((tokenizer, adapted), TEXTS)
    torch.testing.assert_close(in_peft, ours, rtol=1e-5, atol=1e-6)
    merged = tmp_path / "merged"
    assert command(["merge-lora", str(final), "--output", str(merged)]) == 0
    loaded = tokenizer, AutoModelForSequenceClassification.from_pretrained(merged)
    assert loaded[1].config.id2label == {0: "0", 1: "1", 2: "2"}
    torch.testing.assert_close(scores_of_rows(loaded, TEXTS), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.campaign
def test_a_run_that_was_stopped_ends_as_the_one_that_never_was(resolve):
    shared = (*LORA, "checkpoint.every_steps=1")
    whole = training.train(resolve("reward", *shared, name="whole")).folder
    resumed = training.resume(stopped_after(2, resolve("reward", *shared, name="half"))).folder
    assert weights_of(resumed) == weights_of(whole)
    assert lines_of(resumed) == lines_of(whole)


@pytest.mark.campaign
def test_a_reward_model_begins_with_an_adapter_that_answers(resolve, rows_file):
    """Its layers are taken over, and the head is new."""
    start = training.train(
        load_config(
            None,
            overrides=[
                *(f"{key}" for key in ("training.max_steps=2", "run.name=sft", "training.precision=fp32")),
                f"model.name={resolve('reward').config.model.name}",
                f"data.train={rows_file}",
                f"run.output_dir={resolve('reward').config.run.output_dir}",
                "training.learning_rate=0.01",
                "tracking.trackers=[jsonl]",
                *LORA,
            ],
            environ={},
        )
    ).folder
    run = training.train(resolve("reward", f"adapter.start_from={start}", "adapter.method=lora", name="rm")).folder
    first, second = (weights_of(one)["adapter_model.safetensors"] for one in (start, run))
    assert len(second) > len(first)
    assert lines_of(run)[0]["eval_rewards_margin"] == 0.0


def test_a_reward_model_begins_at_ln_2_and_answers_nothing(resolve, capsys):
    """One short run: its start, the rows it is measured on, the scores it prints, what it refuses."""
    result, said = training.train(resolve("reward", "training.max_steps=2")), []
    run = result.folder
    print_result(result, said.append)
    assert said[-1] == f"try it: llmtune predict {run} --data rows.jsonl"
    evaluation = lines_of(run)[0]
    assert evaluation["eval_rewards_margin"] == evaluation["eval_accuracy"] == 0.0
    with pytest.raises(UsageError, match="gives scores and no text") as error:
        load_inference_model(str(run), no_cuda=True)
    assert "llmtune predict" in error.value.problems[0].fix
    capsys.readouterr()
    assert command(["evaluate", str(run), "--json", "--no-cuda"]) == 0
    measured = json.loads(capsys.readouterr().out)
    last = lines_of(run)[-1]
    assert measured["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert measured["eval_accuracy"] == last["eval_accuracy"]
    rows = resolve("reward").config.data.train[0].path
    assert command(["predict", str(run), "--data", rows, "--no-cuda"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["side"] for line in printed[:4]] == ["chosen", "rejected"] * 2
    assert len(printed) == 32
    assert len({line["score"] for line in printed}) > 20
    assert command(["compare", str(run), "--held-out", "--no-cuda"]) == 0
    assert "nats per pair or row" in capsys.readouterr().out
    for unread in (["a question"], ["--system", "x"], ["--max-new-tokens", "9"], ["--seed", "1"], ["--stop", "x"]):
        assert command(["compare", str(run), "--held-out", *unread]) == 2
        assert "nothing is answered" in capsys.readouterr().err
    for words in (["generate", str(run), "hello"], ["export", str(run), "--output", str(run / "model.gguf")]):
        assert command([*words, *(["--no-cuda"] if words[0] == "generate" else [])]) == 2
        assert "gives scores" in capsys.readouterr().err


def test_a_held_out_label_that_was_never_trained_is_named(resolve, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text('{"text": "a word", "label": 7}\n')
    with pytest.raises(DataError, match="no training row has the label `7`") as error:
        training.train(resolve("classification", "data.test_size=0", f"data.eval={held}"))
    assert error.value.problems[0].where.endswith("held.jsonl:1")


@pytest.mark.campaign
@pytest.mark.parametrize("method", ["reward", "classification"])
def test_two_processes_train_as_one(resolve, tmp_path, method):
    """Counts, means and the F1 of labels are those of all rows, on whichever process they lie."""
    settings = ("training.max_steps=2", "training.optimizer=sgd")
    alone = lines_of(training.train(resolve(method, *settings, name="alone")).folder)
    path = tmp_path / "shared.yaml"
    path.write_text(config_to_yaml(resolve(method, *settings, name="shared").config))
    codes, said = in_two_ranks(lambda: command(["train", "--config", str(path)]))
    assert codes == [0, 0], said
    for line, other in zip(lines_of(tmp_path / "runs" / "shared"), alone, strict=True):
        numbers = [key for key, value in other.items() if isinstance(value, float) and key in line]
        assert {"train_loss", "eval_loss"} & set(numbers)
        for key in numbers:
            assert line[key] == pytest.approx(other[key], rel=1e-6, abs=1e-6), key
