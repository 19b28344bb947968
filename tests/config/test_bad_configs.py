"""Q1: every problem of a config is refused with its line, its value and the way out; one row of the table is one bad
file.
"""

from __future__ import annotations

import pytest

import fix_lines
from llmtune.config.contradictions import CONTRADICTIONS
from llmtune.config.layers import load_config
from llmtune.errors import ConfigError

CONTRADICTION_FIXES = {row.fix for row in CONTRADICTIONS}

# name -> (text of the file, [(line, words the problem and its fix must hold), ...])
BAD: dict[str, tuple[str, list[tuple[int, tuple[str, ...]]]]] = {
    # unknown keys
    "typo in a key": (
        "training:\n  lerning_rate: 1e-4\n",
        [(2, ("unknown key `training.lerning_rate`", "`1e-4`", "did you mean `training.learning_rate`"))],
    ),
    "plural of a key": ("training:\n  epoch: 3\n", [(2, ("`training.epoch`", "`training.epochs`"))]),
    "swapped letters": ("data:\n  trian: [a.jsonl]\n", [(2, ("`data.trian`", "`[a.jsonl]`", "`data.train`"))]),
    "typo two sections deep": (
        "model:\n  architecture:\n    d_modl: 64\n",
        [(3, ("`model.architecture.d_modl`", "`model.architecture.d_model`"))],
    ),
    "key of another section": (
        "model:\n  learning_rate: 1e-4\n",
        [(2, ("`model.learning_rate`", "write `training.learning_rate`"))],
    ),
    "key of two other sections": (
        "data:\n  every_steps: 5\n",
        [(2, ("`evaluation.every_steps`", "`checkpoint.every_steps`", "`tracking.every_steps`"))],
    ),
    "other toolkit's name in the wrong section": (
        "model:\n  num_train_epochs: 3\n",
        [(2, ("`model.num_train_epochs`", "write `training.epochs`"))],
    ),
    "typo at the top": ("lerning_rate: 1e-4\n", [(1, ("`lerning_rate`", "`training.learning_rate`"))]),
    "typo of another toolkit's name": ("num_train_epoch: 3\n", [(1, ("`num_train_epoch`", "`training.epochs`"))]),
    "typo in a section": ("trainig:\n  epochs: 3\n", [(1, ("unknown section `trainig`", "did you mean `training`"))]),
    "section nobody knows": ("zzz:\n  a: 1\n", [(1, ("unknown section `zzz`", "run, model"))]),
    "key nobody knows": ("data:\n  qqqqqq: 1\n", [(2, ("`data.qqqqqq`", "the keys of `data` are train, eval"))]),
    "upper case key": ("training:\n  EPOCHS: 1\n", [(2, ("`training.EPOCHS`", "`training.epochs`"))]),
    "dashes in a key": ("training:\n  batch-size: 1\n", [(2, ("`training.batch-size`", "`training.batch_size`"))]),
    "a key of a source": (
        "data:\n  train:\n    - path: a\n      wieght: 2\n",
        [(4, ("`data.train`", "`wieght`", "did you mean `weight`"))],
    ),
    # wrong types
    "word for a number": (
        "training:\n  batch_size: four\n",
        [(2, ("`training.batch_size` must be a whole number or `auto`", "`four`"))],
    ),
    "fraction for a whole number": (
        "adapter:\n  method: lora\n  r: 8.5\n",
        [(3, ("`adapter.r` must be a whole number", "`8.5`"))],
    ),
    "time for a number": ("training:\n  max_steps: 12:30:45\n", [(2, ("`training.max_steps`", "`12:30:45`"))]),
    "hexadecimal": ("run:\n  seed: 0x10\n", [(2, ("`run.seed`", "`0x10`"))]),
    "truth for a number": ("training:\n  epochs: yes\n", [(2, ("`training.epochs` must be a number", "`yes`"))]),
    "number for truth": (
        "checkpoint:\n  keep_best: 1\n",
        [(2, ("`checkpoint.keep_best` must be true or false", "`1`"))],
    ),
    "infinite": ("training:\n  learning_rate: .inf\n", [(2, ("`training.learning_rate`", "`.inf`"))]),
    "too large to be finite": ("training:\n  learning_rate: 1e999\n", [(2, ("must be a finite number", "`1e999`"))]),
    "not a number": ("training:\n  eps: .nan\n", [(2, ("`training.eps`", "`.nan`"))]),
    "percent": ("training:\n  warmup_ratio: 3%\n", [(2, ("`training.warmup_ratio`", "`3%`", "0.03"))]),
    "number with a comma": ("training:\n  max_steps: 1,000\n", [(2, ("`training.max_steps`", "`1,000`"))]),
    "list for one value": ("training:\n  epochs: [1, 2]\n", [(2, ("`training.epochs`", "`[1, 2]`"))]),
    "mapping for one value": ("run:\n  seed: {a: 1}\n", [(2, ("`run.seed`", "`{a: 1}`"))]),
    "value for a section": ("training: 3\n", [(1, ("`training` is a section", "`3`", "epochs"))]),
    "list for a section": ("checkpoint: [1]\n", [(1, ("`checkpoint` is a section", "`[1]`"))]),
    "null where text is needed": ("run:\n  output_dir: null\n", [(2, ("`run.output_dir` must be text", "`null`"))]),
    "nothing where a number is needed": ("training:\n  batch_size:\n", [(2, ("`training.batch_size`",))]),
    "one of three betas": (
        "training:\n  betas: [0.9, 0.99, 0.999]\n",
        [(2, ("`training.betas` must be a list of 2",))],
    ),
    "value on the line below its key": (
        "training:\n  epochs:\n    -3\n  batch_size:\n\n    four\n",
        [(3, ("`training.epochs`", "`-3`")), (6, ("`training.batch_size`", "`four`"))],
    ),
    "value at its anchor": (
        "x-rate: &rate -1\ntraining:\n  learning_rate: *rate\n",
        [(1, ("`training.learning_rate`", "`-1`"))],
    ),
    "contradiction with a value below its key": (
        "model:\n  quantization:\n    4bit\n",
        [(3, ("a quantized base is frozen", "model.quantization"))],
    ),
    "word in a list of numbers": ("training:\n  betas: [0.9, high]\n", [(2, ("`training.betas`", "`high`"))]),
    "list in a list": ("run:\n  tags: [[a]]\n", [(2, ("`run.tags`", "`[a]`"))]),
    "number too large": ("training:\n  max_steps: 99999999999999999999999\n", [(2, ("`training.max_steps`",))]),
    # choices
    "unknown precision": (
        "training:\n  precision: bf17\n",
        [(2, ("`training.precision`", "`bf17`", "did you mean `bf16`"))],
    ),
    "unknown schedule": (
        "training:\n  lr_schedule: cosinus\n",
        [(2, ("`training.lr_schedule`", "`cosinus`", "`cosine`"))],
    ),
    "unknown packing": ("data:\n  packing: bestfit\n", [(2, ("`data.packing`", "`best_fit`"))]),
    "unknown tracker": (
        "tracking:\n  trackers: [console, tensorbord]\n",
        [(2, ("`tracking.trackers`", "`tensorbord`", "did you mean `tensorboard`"))],
    ),
    "quantization by number": ("model:\n  quantization: 5\n", [(2, ("`model.quantization`", "`4bit`"))]),
    "watch true": ("tracking:\n  watch: true\n", [(2, ("`tracking.watch`", "`gradients`"))]),
    # ranges
    "batch of nothing": ("training:\n  batch_size: 0\n", [(2, ("`training.batch_size` must be at least 1", "`0`"))]),
    "negative test size": ("data:\n  test_size: -1\n", [(2, ("`data.test_size` must be at least 0", "`-1`"))]),
    "one and a half rows": ("data:\n  test_size: 1.5\n", [(2, ("`data.test_size`", "whole number of rows", "`1.5`"))]),
    "dropout of everything": (
        "adapter:\n  method: lora\n  dropout: 1\n",
        [(3, ("`adapter.dropout` must be at least 0 and below 1",))],
    ),
    "length of one": ("data:\n  max_length: 1\n", [(2, ("`data.max_length` must be at least 2",))]),
    "no steps": ("training:\n  max_steps: 0\n", [(2, ("`training.max_steps` must be at least 1",))]),
    "no epochs": ("training:\n  epochs: 0\n", [(2, ("`training.epochs` must be above 0",))]),
    "negative learning rate": ("training:\n  learning_rate: -1e-4\n", [(2, ("must be above 0", "`-1e-4`"))]),
    "warm-up of twice the run": ("training:\n  warmup_ratio: 2\n", [(2, ("`training.warmup_ratio`", "at most 1"))]),
    "beta of one": ("training:\n  betas: [0.9, 1]\n", [(2, ("`training.betas`", "below 1"))]),
    "negative seed": ("run:\n  seed: -1\n", [(2, ("`run.seed`", "at least 0"))]),
    "no time to answer": ("distributed:\n  timeout_s: 0\n", [(2, ("`distributed.timeout_s` must be above 0",))]),
    "source of no weight": ("data:\n  train: [{path: a, weight: 0}]\n", [(2, ("`data.train`", "`weight`", "above 0"))]),
    "source without a path": ("data:\n  train: [{weight: 2}]\n", [(2, ("`data.train`", "`path`"))]),
    "empty path": ('data:\n  train: [""]\n', [(2, ("`data.train`", "empty path"))]),
    "empty name": ('model:\n  name: ""\n', [(2, ("`model.name` must not be empty",))]),
    "unknown field in the run's name": ('run:\n  name: "{modle}"\n', [(2, ("`run.name`", "{model}"))]),
    "attribute in the run's name": ('run:\n  name: "{model.__class__}"\n', [(2, ("`run.name`",))]),
    "open brace in the run's name": ('run:\n  name: "{model"\n', [(2, ("`run.name`", "braces"))]),
    "the same tracker twice": (
        "tracking:\n  trackers: [console, console]\n",
        [(2, ("`tracking.trackers`", "only once"))],
    ),
    # contradictions
    "quantized and fully trained": (
        "model:\n  quantization: 4bit\n",
        [(2, ("quantized base", "`adapter.method: lora`"))],
    ),
    "rank without an adapter": ("adapter:\n  r: 8\n", [(2, ("does nothing without an adapter", "`adapter.r: 8`"))]),
    "two warm-ups": (
        "training:\n  warmup_steps: 5\n  warmup_ratio: 0.1\n",
        [(2, ("both in steps and as a ratio", "set one of them to null"))],
    ),
    "constant with warm-up": (
        "training:\n  lr_schedule: constant\n  warmup_steps: 5\n",
        [(2, ("`constant` has no warm-up", "constant_with_warmup"))],
    ),
    "trained weights that would wait on the host": (
        "model:\n  offload_weights: true\n  gradient_checkpointing: true\nadapter:\n  method: none\n",
        [(2, ("only frozen ones can wait on the host", "`model.offload_weights: true`", "set `adapter.method: lora`"))],
    ),
    "weights that are gone when the backward pass begins": (
        "model:\n  offload_weights: true\nadapter:\n  method: lora\n",
        [(2, ("is computed again when they have come back", "set `model.gradient_checkpointing: true` (or `offload`"))],
    ),
    "8-bit weights that would wait on the host": (
        "model:\n  offload_weights: true\n  gradient_checkpointing: auto\n  quantization: 8bit\n"
        "adapter:\n  method: lora\n",
        [(2, ("layers in 8 bits", "set `model.quantization: 4bit`"))],
    ),
    "compiled blocks whose weights wait elsewhere": (
        "model:\n  offload_weights: true\n  gradient_checkpointing: true\nadapter:\n  method: lora\n"
        "training:\n  compile: true\n",
        [(2, ("read their weights where they were compiled", "set `training.compile: false`"))],
    ),
    "weights that wait on the host and in parts": (
        "model:\n  offload_weights: true\n  gradient_checkpointing: true\nadapter:\n  method: lora\n"
        "distributed:\n  strategy: fsdp\n",
        [(2, ("whole, or in parts of each process", "fsdp has an offload of its own"))],
    ),
    "compiled blocks whose inputs wait elsewhere": (
        "training:\n  compile: true\nmodel:\n  gradient_checkpointing: offload\n",
        [(2, ("cannot be compiled", "`training.compile: true`", "or `model.gradient_checkpointing: true`"))],
    ),
    "early stopping without held-out rows": (
        "evaluation:\n  early_stopping_patience: 2\n  every_steps: 5\n  prompts: [a]\n",
        [(2, ("no rows are held out", "`data.test_size`"))],
    ),
    "early stopping without evaluations": (
        "data: {test_size: 5}\nevaluation:\n  early_stopping_patience: 2\n",
        [(3, ("`evaluation.every_steps`",))],
    ),
    "threshold without patience": ("evaluation:\n  early_stopping_threshold: 0.1\n", [(2, ("without a patience",))]),
    "evaluating nothing": ("evaluation:\n  every_steps: 5\n", [(2, ("nothing to evaluate",))]),
    "longer than long": ("data:\n  min_length: 100\n  max_length: 50\n", [(2, ("`data.min_length: 100`",))]),
    "text column of conversations": ("data:\n  text_column: body\n  format: messages\n", [(2, ("only text rows",))]),
    "heads that do not divide": (
        "model: {architecture: {d_model: 100, n_heads: 3}}\n",
        [(1, ("heads must divide the width",))],
    ),
    "warm-up beyond the end": (
        "training:\n  warmup_steps: 50\n  max_steps: 10\n",
        [(2, ("longer than the training",))],
    ),
    "mode of an absent tracker": ("tracking:\n  wandb_mode: offline\n", [(2, ("wandb is not a tracker",))]),
    "fp16 gradients": (
        "model: {dtype: float16}\ntraining: {precision: fp16}\n",
        [(2, ("fp16 arithmetic", "`model.dtype: auto`"))],
    ),
    "clipped in the backward pass": (
        "training:\n  step_in_backward: true\n",
        [(2, ("cannot be clipped", "`training.step_in_backward: true`", "set `training.max_grad_norm: null`"))],
    ),
    "all that needs every gradient at once": (
        "tracking: {watch: gradients}\ntraining:\n  step_in_backward: true\n  max_grad_norm: 0.5\n  precision: fp16\n",
        [
            (3, ("`training.max_grad_norm: 0.5`",)),
            (3, ("fp16's loss scale", "bf16")),
            (3, ("histograms", "`tracking.watch: false`")),
        ],
    ),
    # the file itself
    "the same key twice": (
        "training:\n  epochs: 1\n  batch_size: 2\n  epochs: 5\n",
        [(4, ("key `epochs` stands twice", "`5`", "bad.yaml:2"))],
    ),
    "the same section twice": ("run:\n  seed: 1\nrun:\n  seed: 2\n", [(3, ("key `run` stands twice",))]),
    "two names of one key": (
        "num_train_epochs: 3\ntraining:\n  epochs: 4\n",
        [(3, ("`num_train_epochs`", "both set `training.epochs`"))],
    ),
    "bracket left open": ("run:\n  tags: [a, b\nmodel:\n  name: x\n", [(3, ("not valid YAML",))]),
    "tab for indentation": ("run:\n\tseed: 1\n", [(2, ("not valid YAML", "spaces, not tabs"))]),
    "quote left open": ('run:\n  name: "abc\n', [(3, ("not valid YAML",))]),
    "control character": ("run:\n  name: a\x07b\n", [(2, ("not allowed in YAML", "\\x07"))]),
    "list at the top": ("- a\n- b\n", [(1, ("a config is a mapping of sections",))]),
    "text at the top": ("hello\n", [(1, ("a config is a mapping of sections", "`hello`"))]),
    "two documents": ("run:\n  seed: 1\n---\nrun:\n  seed: 2\n", [(3, ("a second document",))]),
    "python tag": (
        "run:\n  name: !!python/object/apply:os.system [touch /tmp/x]\n",
        [(2, ("would run code", "!!python/object/apply:os.system"))],
    ),
    "python name tag": ("run:\n  name: !!python/name:os.system\n", [(2, ("would run code",))]),
    "unknown tag": ("run:\n  name: !mine a\n", [(2, ("tag `!mine`",))]),
    "binary": ("run:\n  name: !!binary aGVsbG8=\n", [(2, ("tag `!!binary`",))]),
    "alias to itself": ("run:\n  tags: &a [x, *a]\n", [(2, ("refers to itself", "`*a`"))]),
    "mapping that holds itself": ("run: &a\n  notes: *a\n", [(2, ("refers to itself",))]),
    "alias to nothing": ("run:\n  tags: *nobody\n", [(2, ("`*nobody`",))]),
    "alias bomb": (
        "x-a: &a ["
        + "lol, " * 200
        + "]\nx-b: &b ["
        + "*a, " * 200
        + "]\nx-c: &c ["
        + "*b, " * 200
        + "]\nrun:\n  tags: *c\n",
        [(3, ("beyond all bounds",))],
    ),
    "nested without end": ("run:\n  tags: " + "[" * 5000 + "]" * 5000 + "\n", [(2, ("levels deep",))]),
    "list as a key": ("run:\n  [a, b]: 1\n", [(2, ("cannot be a key",))]),
    "merging a text": ("run:\n  <<: hello\n", [(2, ("`<<` needs a mapping",))]),
    # extends
    "unknown preset": ("extends: produktion\n", [(1, ("no preset or file `produktion`", "did you mean `production`"))]),
    "unknown preset in a list": (
        "extends:\n  - test\n  - tset\n",
        [(3, ("no preset or file `tset`", "did you mean `test`"))],
    ),
    "a source without rows": (
        "data:\n  train: [{path: a, repeat: 0}]\n",
        [(2, ("`repeat` above 0", "llmtune docs data"))],
    ),
    "a format of a source": (
        "data:\n  train: [{path: a, format: chatml}]\n",
        [(2, ("a mapping with `format` one of `auto`, ", "not `chatml`", "llmtune docs data"))],
    ),
    "a part of a list": (
        "data:\n  train.0: a.jsonl\n",
        [(2, ("`data.train.0`", "written as one value: `data.train=["))],
    ),
    "extends of a mapping": ("extends: {a: b}\n", [(1, ("`extends` must be",))]),
    "extends itself": ("extends: ./bad.yaml\n", [(1, ("names this file itself",))]),
    # nobody let in
    "trust from a file": ("model:\n  trust_remote_code: true\n", [(2, ("runs code", "--trust-remote-code"))]),
    "trust at the top": ("trust_remote_code: true\n", [(1, ("runs code",))]),
    "code by name": ("model:\n  _component_: os.system\n", [(2, ("names code to import",))]),
    "key in a config": ("wandb_api_key: 0123456789abcdef\n", [(1, ("`wandb_api_key` would keep a secret",))]),
    "token in a section": ("model:\n  hf_token: abcdefgh\n", [(2, ("would keep a secret",))]),
    "secret as a value": ("run:\n  notes: hf_" + "a" * 34 + "\n", [(2, ("looks like a secret",))]),
    # refused names
    "resume from yaml": ("resume_from_checkpoint: x\n", [(1, ("llmtune resume",))]),
    "upload": ("push_to_hub: true\n", [(1, ("uploads nothing",))]),
    "evaluation by a word of nobody": ("eval_strategy: often\n", [(1, ("`eval_strategy`", "`epoch`"))]),
    "wrong value under another name": (
        "num_train_epochs: many\n",
        [(1, ("`num_train_epochs` (`training.epochs` here)", "`many`"))],
    ),
    "another toolkit's flag that is no truth": (
        "load_in_4bit: maybe\n",
        [(1, ("`load_in_4bit` must be true or false", "`maybe`"))],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_config_is_refused_with_its_line_its_value_and_the_way_out(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, expected = BAD[name]
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config("bad.yaml", environ={})
    said = [(problem.where, f"{problem.problem} | {problem.fix}") for problem in caught.value.problems]
    assert len(said) == len(expected), said
    for (where, message), (line, words) in zip(said, expected, strict=True):
        assert where is not None
        assert where.split(" and ")[0] == f"bad.yaml:{line}", said
        for word in words:
            assert word in message, message


@pytest.mark.parametrize("name", BAD)
def test_each_setting_that_a_fix_proposes_takes_its_problem_away(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(BAD[name][0])
    for problem in problems_of():
        for setting in fix_lines.settings_in(problem.fix or ""):
            left = problems_of(setting)
            # A value that cannot be read stays wrong below one that can: there the setting itself must be taken.
            is_contradiction = problem.fix in CONTRADICTION_FIXES
            assert not is_contradiction or problem.problem not in [row.problem for row in left], setting
            assert not [row for row in left if row.where == "command line"], setting


def problems_of(*settings):
    try:
        load_config("bad.yaml", overrides=settings, environ={})
    except ConfigError as error:
        return error.problems
    return ()


def test_the_table_is_long_enough_to_mean_something():
    assert len(BAD) >= 60


def test_no_secret_is_repeated_in_its_refusal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in (
        "wandb_api_key: CANARY123456\n",
        "model: {hf_token: CANARY123456}\n",
        "run: {notes: hf_CANARY" + "a" * 30 + "}\n",
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config("bad.yaml", environ={})
        assert "CANARY" not in str(caught.value)


def test_three_typos_one_wrong_type_and_one_unknown_preset_are_five_problems_in_one_answer(tmp_path, monkeypatch):
    """Q1, and the seventh thing the main job must show."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(
        "extends: developement\ntraining:\n  lerning_rate: 1e-4\n  batch_size: four\n  epohcs: 3\ndata:\n  max_lenght: 512\n"  # noqa: E501
    )
    with pytest.raises(ConfigError) as caught:
        load_config("my.yaml", environ={})
    found = [(problem.where, problem.problem, problem.fix or "") for problem in caught.value.problems]
    assert caught.value.exit_code == 2
    assert [where for where, _, _ in found] == [f"my.yaml:{line}" for line in (1, 3, 4, 5, 7)]
    nearest = ("`development`", "`training.learning_rate`", "whole number", "`training.epochs`", "`data.max_length`")
    for near, (_, problem, fix) in zip(nearest, found, strict=True):
        assert near in problem + fix
