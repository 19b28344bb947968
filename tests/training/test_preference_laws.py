"""Laws of runs that compare answers: where they begin, what their reference is, and that some have none.

Each law is a function that the copies of our code below, which break it, are given too.
"""

import gc
import hashlib
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from chat_templates import CHATML
from llmtune import prepare
from llmtune.config.process_options import Options
from llmtune.engine import preference, reference
from llmtune.plan import reference_memory, resolve_auto
from llmtune.runs.signals import StopRequest
from llmtune.training import build, objectives, reference_log_probs
from llmtune.training import train as training
from training_helpers import FOUR_BIT, LORA, comparing_run, first_window, lines_of

LN2 = float(-torch.nn.functional.logsigmoid(torch.zeros(())))


@pytest.fixture
def resolve(tiny_model_folder, pairs_file, tmp_path):
    """The config of a DPO run of two steps on the pairs; further KEY=VALUE on top."""

    def resolve(*overrides, model=tiny_model_folder, name="run"):
        basis = ("data.test_size=0", "objective.method=dpo", "training.max_steps=2")
        return comparing_run(model, pairs_file, tmp_path, *basis, *overrides, name=name)

    return resolve


@pytest.fixture(scope="module")
def folders(tiny_model_folder, pairs_file, tmp_path_factory):
    """Models and adapters to begin with, by name."""
    folder = tmp_path_factory.mktemp("starts")
    with_dropout = folder / "with dropout"
    shutil.copytree(tiny_model_folder, with_dropout)
    settings = json.loads((with_dropout / "config.json").read_text())
    (with_dropout / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.5}))
    made = {"the model": tiny_model_folder, "with dropout": with_dropout}
    for name, more in {"adapter": LORA, "4-bit adapter": FOUR_BIT}.items():
        basis = ("data.test_size=0", "objective.method=orpo", "training.max_steps=3")
        config = comparing_run(tiny_model_folder, pairs_file, folder, *basis, *more, name=name)
        run = training.train(config, print_line=lambda _: None).folder
        made[name] = run / "checkpoints" / "final"
    return made


# --- 1: before step 1 the model is its own reference

BF16 = ("training.precision=bf16",)
STARTS = {
    "full": ("the model", (), None),
    "full with dropout": ("with dropout", (), None),
    "full in bf16": ("the model", BF16, None),
    "lora with dropout": ("the model", LORA, None),
    "lora in bf16": ("the model", (*LORA, *BF16), None),
    "qlora": ("the model", FOUR_BIT, None),
    "start_from": ("the model", LORA, "adapter"),
    "start_from in bf16": ("the model", (*LORA, *BF16), "adapter"),
    "start_from, qlora": ("the model", FOUR_BIT, "4-bit adapter"),
}
"""Model, settings, and the adapter that training starts from."""

LOSSES = {
    "dpo": ((), LN2),
    "smoothed": (("objective.label_smoothing=0.2",), LN2),
    "hinge": (("objective.loss=hinge",), 1.0),
    "ipo": (("objective.loss=ipo", "objective.beta=0.5"), 1 / (4 * 0.5**2)),
    "kto": (("objective.method=kto", "objective.desirable_weight=1.5"), 0.5 * (1.5 + 1.0) / 2),
    "apo_zero": (("objective.method=kto", "objective.loss=apo_zero", "objective.desirable_weight=3"), 0.5 * 4 / 2),
}
"""Settings, and the loss where both models are one; half of the answers of `kto` are desirable."""


def a_run_begins_with_no_difference(resolve, folders, start, loss):
    model, settings, adapter = STARTS[start]
    more, value = LOSSES[loss]
    begin = () if adapter is None else (f"adapter.start_from={folders[adapter]}",)
    found = first_window(resolve(*settings, *begin, *more, model=folders[model]))
    assert found.loss == value
    assert found.metrics["rewards_margin"] == found.metrics["rewards_chosen"] == 0.0
    assert found.metrics.get("accuracy", 0.0) == found.metrics.get("kl", 0.0) == 0.0


BOTH = [(start, loss) for start in STARTS for loss in LOSSES]
OFTEN = {*((start, "dpo") for start in STARTS), *(("start_from", loss) for loss in LOSSES)}


@pytest.mark.parametrize(
    ("start", "loss"),
    [pytest.param(*both, marks=[] if both in OFTEN else pytest.mark.campaign) for both in BOTH],
)
def test_a_run_begins_with_no_difference(resolve, folders, start, loss):
    a_run_begins_with_no_difference(resolve, folders, start, loss)


def dropout_stays(monkeypatch):
    monkeypatch.setattr(objectives, "switch_off_dropout", lambda _: 0)


def dropout_of_the_adapter_stays(monkeypatch):
    dropout_stays(monkeypatch)
    honest = preference.for_comparison

    def keeping(config):
        changed, decisions = honest(config)
        return replace(changed, adapter=config.adapter), decisions

    monkeypatch.setattr(prepare, "for_comparison", keeping)


def base_as_reference(monkeypatch):
    """The bare base, also where training goes on from an adapter."""
    monkeypatch.setattr(resolve_auto, "begins_anew", lambda adapter: adapter.method != "none")


def reference_without_autocast(monkeypatch):
    honest = reference.LiveReference.log_probs

    def in_float32(self, batch):
        with torch.autocast("cpu", enabled=False):
            return honest(self, batch)

    monkeypatch.setattr(reference.LiveReference, "log_probs", in_float32)


def weights_left_out(monkeypatch):
    honest = preference.kto_losses
    monkeypatch.setattr(preference, "kto_losses", lambda *given, **named: honest(*given, **named | {"weights": (1, 1)}))


BEGINNINGS = {
    "dropout of the model": (dropout_stays, "full with dropout", "dpo"),
    "dropout of the adapter": (dropout_of_the_adapter_stays, "start_from", "dpo"),
    "the base as reference": (base_as_reference, "start_from", "hinge"),
    "a reference in float32": (reference_without_autocast, "full in bf16", "dpo"),
    "answers without weights": (weights_left_out, "lora with dropout", "kto"),
}


@pytest.mark.parametrize(("break_it", "start", "loss"), BEGINNINGS.values(), ids=BEGINNINGS)
def test_a_run_that_begins_otherwise_is_found(resolve, folders, monkeypatch, break_it, start, loss):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        a_run_begins_with_no_difference(resolve, folders, start, loss)


# --- 4: the reference stays as it is

REFERENCES = {
    "base": ("objective.reference=base", *LORA),
    "start": ("objective.reference=start", *LORA),
    "start, full": ("objective.reference=start",),
    "model": ("objective.reference=model",),
    "precomputed": ("objective.reference=precomputed",),
}


def the_reference_stays(resolve, folders, kind):
    """The bytes of what it says of every row, and of every weight that is not trained, before and after training."""
    second = (f"objective.reference_model={folders['the model']}",) if kind == "model" else ()
    with StopRequest() as stop:
        resolved = resolve(*REFERENCES[kind], *second, "training.learning_rate=0.01")
        run = training.open_run(resolved, Options(), stop, print_line=lambda _: None)
        objective = run.setup.objective.loss_sum.__self__
        window = run.setup.batches.window(1)

        def digests():
            frozen = [weight for weight in run.setup.model.parameters() if not weight.requires_grad]
            said = [objective._reference.log_probs(batch) for batch in window.micro_batches]
            return [hashlib.sha256(values.detach().numpy().tobytes()).hexdigest() for values in (*said, *frozen)]

        def policy():
            with torch.no_grad():
                return torch.cat([run.setup.engine.log_probs(batch) for batch in window.micro_batches])

        before, ours = digests(), policy()
        assert len(list(run.steps())) == 2
        assert (policy() - ours).abs().max() > 1e-2
        assert digests() == before


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_reference_is_the_same_after_training(resolve, folders, kind):
    the_reference_stays(resolve, folders, kind)


def no_copy(monkeypatch):
    monkeypatch.setattr(reference.FrozenCopy, "in_place", lambda _: nullcontext())


def with_its_adapter(monkeypatch):
    import peft

    monkeypatch.setattr(peft.PeftModel, "disable_adapter", lambda _: nullcontext())


MOVED = {"a reference that is no copy": (no_copy, "start, full"), "a base with its adapter": (with_its_adapter, "base")}


@pytest.mark.parametrize(("break_it", "kind"), MOVED.values(), ids=MOVED)
def test_a_reference_that_moves_is_found(resolve, folders, monkeypatch, break_it, kind):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        the_reference_stays(resolve, folders, kind)


# --- 4: log-probabilities measured once


def measured_equals_live(resolve):
    live, once = (
        lines_of(training.train(resolve(f"objective.reference={kind}", name=kind), print_line=lambda _: None).folder)
        for kind in ("start", "precomputed")
    )
    for line, other in zip(once, live, strict=True):
        numbers = [key for key, value in line.items() if isinstance(value, float)]
        assert [line[key] for key in numbers] == pytest.approx([other[key] for key in numbers], rel=1e-5, abs=1e-6)
    assert abs(live[-1]["rewards_margin"]) > 1e-3


def test_what_was_measured_once_is_what_the_live_reference_says(resolve):
    measured_equals_live(resolve)


def test_measured_numbers_of_other_rows_are_found(resolve, monkeypatch):
    honest = reference.PrecomputedReference.log_probs

    def of_the_next_row(self, batch):
        return honest(self, replace(batch, indices=(batch.indices + 2) % len(self._log_probs_N)))

    monkeypatch.setattr(reference.PrecomputedReference, "log_probs", of_the_next_row)
    with pytest.raises(AssertionError):
        measured_equals_live(resolve)


OTHERS = {
    "model": "base",
    "adapter": "weights",
    "data": "rows",
    "template": "rows",
    "length": "rows",
}
"""Of another one of these the numbers are measured anew; what of the key of the cache tells them apart."""

KEY = {"base": "self._base_digest,\n", "weights": "weights.hexdigest(),\n", "rows": "examples.digest,\n"}


@pytest.fixture
def another(resolve, folders, pairs_file, tmp_path):
    """Two configs that differ in one thing, whose reference is measured once."""

    def changed_weights(folder):
        from safetensors.torch import load_file, save_file

        (path,) = folder.glob("*.safetensors")
        save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
        (folder / "manifest.json").unlink(missing_ok=True)
        return folder

    def copy_of(folder):
        return shutil.copytree(folder, tmp_path / "another")

    def another(thing):
        settings = ["objective.reference=precomputed", *LORA]
        more, model = [], folders["the model"]
        if thing == "model":
            model = changed_weights(copy_of(model))
        elif thing == "adapter":
            settings.append(f"adapter.start_from={folders['adapter']}")
            more.append(f"adapter.start_from={changed_weights(copy_of(folders['adapter']))}")
        elif thing == "data":
            rows = tmp_path / "other.jsonl"
            rows.write_text(pairs_file.read_text().replace(" no", " nor", 1))
            more.append(f"data.train={rows}")
        elif thing == "template":
            path = tmp_path / "template.jinja"
            path.write_text(CHATML.replace("user", "person").replace("\n{{", "\n {{"))
            more.append(f"model.chat_template={path}")
        else:
            more += ["data.max_length=24", "data.overlong=truncate_right"]
        return resolve(*settings, name="first"), resolve(*settings, *more, model=model, name="second")

    return another


def numbers_of_another_are_not_read(configs, cache):
    for config in configs:
        found = first_window(config)
        assert abs(found.metrics["rewards_margin"]) < 1e-6
        assert found.loss == pytest.approx(LN2, abs=1e-6)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("thing", OTHERS)
def test_numbers_measured_with_another_one_are_not_read(another, tmp_path, thing):
    numbers_of_another_are_not_read(another(thing), tmp_path / "cache" / "reference")


@pytest.mark.parametrize(
    "thing",
    [pytest.param(thing, marks=pytest.mark.campaign if thing in ("template", "length") else ()) for thing in OTHERS],
)
def test_a_key_that_leaves_it_out_is_found(another, tmp_path, mutant, monkeypatch, thing):
    broken = mutant(reference_log_probs, KEY[OTHERS[thing]], "'',\n")
    monkeypatch.setattr(objectives, "ReferenceLogProbs", broken.ReferenceLogProbs)
    with pytest.raises(AssertionError):
        numbers_of_another_are_not_read(another(thing), tmp_path / "cache" / "reference")


# --- 7: SimPO and ORPO have no reference


def bytes_of_tensors():
    """Bytes of all tensors that there are, each memory counted once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def held_by(config):
    """Bytes of tensors and forward passes of a run with its first window computed, and its plan's."""
    before = bytes_of_tensors()
    with StopRequest() as stop:
        run = training.open_run(config, Options(), stop, print_line=lambda _: None)
        passes = []
        hook = run.setup.model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
        window = run.setup.batches.window(1)
        run.setup.objective.begin_window(window, run.devices)
        for batch in window.micro_batches:
            run.setup.objective.loss_sum(batch)
        hook.remove()
        held, planned = bytes_of_tensors() - before, run.plan.memory.parts["reference"]
        weights = sum(weight.nbytes for weight in run.setup.parameters.values())
        said = any(decision.key == "objective.reference" for decision in run.setup.decisions)
        run.close()
    return held, planned, len(passes) / len(window.micro_batches), said, weights


def methods_without_a_reference_hold_none(resolve):
    with_one, planned, passes, said, weights = held_by(resolve("objective.method=dpo"))
    assert (planned, passes, said) == (weights, 2, True)
    for method in ("simpo", "orpo"):
        held, planned, passes, said, _ = held_by(resolve(f"objective.method={method}"))
        assert (planned, passes, said) == (0, 1, False)
        assert with_one - held == pytest.approx(weights, rel=0.01)


def test_simpo_and_orpo_load_plan_and_run_no_reference(resolve):
    methods_without_a_reference_hold_none(resolve)


def loaded_anyway(monkeypatch):
    monkeypatch.setattr(objectives, "needs_reference", lambda _: True)


def planned_anyway(monkeypatch):
    monkeypatch.setattr(reference_memory, "needs_reference", lambda _: True)


def copied_and_not_used(monkeypatch):
    """Memory alone tells: the copy is neither planned nor run nor said."""
    honest, kept = build.make_objectives, []

    def copying(prepared, options, model, engine, parameters, *given, **named):
        if not preference.needs_reference(prepared.config.objective):
            kept.append(reference.FrozenCopy(tuple(parameters.values())))
        return honest(prepared, options, model, engine, parameters, *given, **named)

    monkeypatch.setattr(build, "make_objectives", copying)


@pytest.mark.parametrize("break_it", [loaded_anyway, planned_anyway, copied_and_not_used])
def test_a_reference_that_nothing_needs_is_found(resolve, monkeypatch, break_it):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        methods_without_a_reference_hold_none(resolve)
