"""A card that is too small: the plan says so beforehand, and the step in which memory ends names a way out."""

import json
import re

import pytest
from pretend import numbers

from llmtune.cli.main import run
from llmtune.engine.choose_device import CUDA_CONTEXT_BYTES
from llmtune.plan.hardware import find_target


@pytest.mark.campaign
def test_memory_that_runs_out_in_step_1_is_refused_by_name_with_its_way_out(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    answer = " ".join(str(number % 90) for number in range(330))
    talks = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": answer}] for n in range(8)]
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    large = ["model.name=custom-nano", f"data.train={rows}", "data.test_size=0", "data.max_length=1024"]
    steps = ["training.batch_size=8", "training.gradient_accumulation_steps=1", f"run.output_dir={tmp_path / 'runs'}"]
    with numbers.machine("small"):
        code = run(["train", "-c", "test", *large, *steps, "evaluation.every_steps=null", "evaluation.prompts=[]"])
    said = capsys.readouterr().err
    assert code == 6, said
    assert "warning: by the plan this does not fit" in said
    problem = r"error: the memory is used up in step 1: [\d.]+ [kM]B more were asked for, [\d.]+ MB were held and "
    assert re.search(problem + r"a card of 0.7 GB has 734.00 MB, [\d.]+ MB of them free now; the plan was ", said), said
    way_out = re.search(r"fix: start again with (.*)", said)[1]
    assert "training.batch_size=1 training.gradient_accumulation_steps=8" in way_out or "checkpointing=true" in way_out


def test_the_driver_s_share_is_counted_once_in_what_a_plan_may_fill():
    """The driver has taken it already when it is asked for what is free, and each plan counts it."""
    with numbers.machine("small") as device:
        assert device.free_bytes == device.card.total_bytes - CUDA_CONTEXT_BYTES
        assert find_target(None).total_bytes == device.card.total_bytes
