"""Whole runs of adapters that begin with a part of their base: the base on the disk stays, resuming is exact."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llmtune.cli.main import main
from llmtune.config.layers import parse_config
from llmtune.engine.preference import begins_anew, resolve_objective
from llmtune.errors import ConfigError
from llmtune.models.read_config import quiet_libraries
from llmtune.training import train as training
from training_helpers import lines_of, weights_of

FEW = ("training.max_steps=3", "checkpoint.every_steps=1", "checkpoint.keep_last=0", "evaluation.every_steps=3")


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        (("adapter.init=pissa",), 8),
        (("adapter.init=olora", "adapter.dora=true"), 8),
        (("adapter.init=loftq", "model.quantization=4bit"), 4),
    ],
    ids=["pissa", "olora", "loftq"],
)
def test_a_resumed_run_ends_bit_for_bit_and_its_adapter_has_the_loss_that_was_logged(
    options, rank, config_of, tiny_model_folder, capsys
):
    run = training.train(config_of(*FEW, "adapter.method=lora", "adapter.r=4", *options)).folder
    whole, lines = weights_of(run), lines_of(run)
    record = json.loads((run / "checkpoints" / "final" / "adapter_base.json").read_text())
    training.resume(str(run), checkpoint="1")
    assert weights_of(run) == whole
    assert lines_of(run)[-len(lines) :] == lines
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    with quiet_libraries():
        tuned = PeftModel.from_pretrained(base, run / "checkpoints" / "final").eval()
    assert tuned.peft_config["default"].r == rank
    assert tuned.peft_config["default"].init_lora_weights is True  # a name would change the base on loading
    plain = training.train(config_of("training.max_steps=1", "adapter.method=lora", *options[1:], name="plain")).folder
    assert record == json.loads((plain / "checkpoints" / "final" / "adapter_base.json").read_text())
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--no-cuda", "--json"])
    measured = json.loads(capsys.readouterr().out)["eval_mean_nll"]
    assert measured == pytest.approx(lines[-1]["eval_mean_nll"], rel=1e-5)


def test_the_reference_of_such_an_adapter_is_a_copy_of_its_start():
    config = parse_config("adapter: {method: lora, init: pissa}\nobjective: {method: dpo}").config
    assert not begins_anew(config.adapter)
    assert begins_anew(replace(config.adapter, init="orthogonal"))
    assert resolve_objective(config.objective, new_adapter=begins_anew(config.adapter)).reference == "start"
    with pytest.raises(ConfigError, match="is not the base"):
        parse_config("adapter: {method: lora, init: pissa}\nobjective: {method: dpo, reference: base}")
    with pytest.raises(ConfigError, match="quantized again"):
        parse_config("adapter: {method: lora, init: olora}\nmodel: {quantization: 4bit}")
