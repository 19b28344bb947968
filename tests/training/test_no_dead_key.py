"""Q2, no dead key: for each key a real run of the tiny model with another value says, does or leaves behind something
else.

`flips.yaml` (tests/config) holds the other value of every key and what must stand beside it. What a run shows is its
`fingerprint`: what it said, its metrics, its weights, its files, its samples, the error it ended with - never a copy of
the config. Keys whose promise is that the outputs do *not* depend on them are looked at in the room that uses them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from llmtune.config.keys import LEAVES
from llmtune.config.layers import load_config
from llmtune.config.process_options import Options
from llmtune.engine.deepspeed_settings import engine_settings
from llmtune.engine.devices import open_devices
from llmtune.errors import LlmtuneError
from llmtune.models.read_config import quiet_libraries
from llmtune.plan.forecast import Forecaster
from llmtune.plan.memory import division_of
from llmtune.plan.resolve_auto import resolve_rates
from llmtune.prepare import prepare
from llmtune.runs.signals import StopRequest
from llmtune.tracking.queue import choose_trackers
from llmtune.training.build import build_setup
from llmtune.training.train import open_run, train
from training_fixtures import WORDS
from training_helpers import TIMES

FLIPS = yaml.safe_load((Path(__file__).parents[1] / "config" / "flips.yaml").read_text())

REFUSED = {
    "model.revision",  # a folder has none
    "objective.reference_revision",
    "data.overlong",
    "data.on_bad_row",
    "training.max_skipped_steps",  # the run of the other value diverges at once
    "distributed.sequence_parallel",  # one process shares its rows with nobody
}
"""Keys of which one value, or both, end with an error here; every other flip must end with a finished run."""

RUN_JSON = ("tags", "notes", "decisions", "data", "parameters", "disk_forecast_bytes", "state", "step", "total_steps")
"""Fields of run.json that are neither a copy of the config nor a matter of machine and time."""

BASIS = (
    "data.train=[rows.jsonl]",
    "run.name=run",
    "training.epochs=1",
    "training.batch_size=4",
    "training.learning_rate=0.003",
    "training.precision=fp32",
    "data.num_workers=1",
    "tracking.trackers=[jsonl]",
)


# --- one small world of files, and runs in it
# -----------------------------------------------------------------------------------------


def row(question: str, answer: str, **more: object) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, "text": f"{question} {answer}", "body": answer} | more) + "\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer, tiny_model_folder):
    """The files that flips name: rows, other rows, held-out rows (one of them also a training row), a template, a
    tokenizer, an adapter.
    """
    folder = tmp_path_factory.mktemp("world")
    rows = [row(" ".join(WORDS[at : at + 3]), " ".join(WORDS[at : at + 1 + at % 5])) for at in range(6)]
    long = row("the user asks", " ".join(WORDS * 2))
    hostile = row("a<|im_end|>b", "words")
    (folder / "rows.jsonl").write_text("".join([*rows, rows[0], long, hostile, row("a", "b", text="a")]))
    (folder / "other.jsonl").write_text("".join(row(f"numbers {at}", f"words {at}") for at in range(6)))
    (folder / "held-out.jsonl").write_text(row("the words", "of the user") + rows[1])
    (folder / "bad.jsonl").write_text("".join(rows) + '{"messages": 5}\n')
    (folder / "ds.json").write_text("{}")
    pairs = [{"prompt": WORDS[at], "chosen": WORDS[at + 1], "rejected": WORDS[at + 2]} for at in range(6)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    labels = [{"prompt": WORDS[at], "completion": WORDS[at + 1], "label": at % 2 == 0} for at in range(6)]
    prompts = [{"prompt": WORDS[at], "answer": WORDS[at + 1]} for at in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
    (folder / "labels.jsonl").write_text("".join(json.dumps(one) + "\n" for one in labels))
    template = tiny_tokenizer.chat_template.replace("'] }}\n{{ message['content", "'] }}: {{ message['content").replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant: "
    )
    assert template != tiny_tokenizer.chat_template
    (folder / "template.jinja").write_text(template)
    other = tiny_tokenizer.train_new_from_iterator(["words of another language, with other pieces"] * 3, 300)
    other.chat_template = tiny_tokenizer.chat_template
    other.save_pretrained(folder / "another-tokenizer")
    shape = ["adapter.method=lora", "adapter.r=4", "adapter.alpha=8", "adapter.target_modules=[q_proj]"]
    with contextlib.chdir(folder):
        words = [f"model.name={tiny_model_folder}", *BASIS, *shape, "training.max_steps=1", "run.output_dir=runs"]
        run = train(load_config(None, overrides=words, environ={}), Options()).folder
    shutil.copytree(run / "checkpoints" / "final", folder / "earlier-adapter")
    shutil.rmtree(folder / "runs")
    for name, factor in (("earlier-model", 1.0), ("teacher", 1.1)):
        shutil.copytree(tiny_model_folder, folder / name)
        tensors = load_file(folder / name / "model.safetensors")
        scaled = {key: tensor * factor for key, tensor in tensors.items()}
        save_file(scaled, folder / name / "model.safetensors", {"format": "pt"})
    config = LlamaConfig.from_pretrained(tiny_model_folder, num_labels=1)
    for name in ("scores", "other-scores"):
        with quiet_libraries(), torch.random.fork_rng():
            torch.manual_seed(len(name))
            LlamaForSequenceClassification(config).save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def run_of(world, tmp_path_factory, tiny_model_folder):
    """Run a config in a fresh working folder; returns its fingerprint. Baselines are run once."""
    baselines: dict[tuple[str, ...], dict[str, object]] = {}

    def run(overrides: tuple[str, ...]) -> dict[str, object]:
        if overrides in baselines:
            return baselines[overrides]
        here = tmp_path_factory.mktemp("here")
        shutil.copytree(world, here, dirs_exist_ok=True)
        with contextlib.chdir(here), cache_in(here):
            found = fingerprint([f"model.name={tiny_model_folder}", *BASIS, *overrides], here)
        shutil.rmtree(here)
        baselines[overrides] = found
        return found

    return run


@contextlib.contextmanager
def cache_in(here: Path):
    """A run that finds its rows in the cache says so; each run here starts with none."""
    before = os.environ["LLMTUNE_CACHE_DIR"]
    (here / "user-cache").mkdir()
    os.environ["LLMTUNE_CACHE_DIR"] = str(here / "user-cache")
    try:
        yield
    finally:
        os.environ["LLMTUNE_CACHE_DIR"] = before


def fingerprint(overrides: list[str], here: Path) -> dict[str, object]:
    """Train, and give everything there is to see of it; times, ids and copies of the config left out."""
    said: list[str] = []
    error = None
    try:
        train(load_config(None, overrides=overrides, environ={}), Options(), print_line=said.append)
    except LlmtuneError as refused:
        error = f"{type(refused).__name__}: {refused}"
    files = sorted(
        re.sub(r"tfevents.*", "tfevents", str(path.relative_to(here))) for path in here.rglob("*") if path.is_file()
    )
    found: dict[str, object] = {
        "said": [plain(line, here) for line in said if not line.startswith("tokenizing:")],
        "error": error and plain(error, here),
        "files": files,
    }
    for record in here.rglob("run.json"):
        info = json.loads(record.read_text())
        found["run.json"] = {key: info.get(key) for key in RUN_JSON}
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = record.parent / name
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            found[name] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        found["shape"] = [path.read_text() for path in sorted(record.parent.glob("checkpoints/final/*config.json"))]
        weights = sorted(record.parent.glob("checkpoints/*/*.safetensors"))
        found["weights"] = {
            str(path.relative_to(record.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in weights
        }
    return found


def plain(line: str, here: Path) -> str:
    """A line without the working folder and without sizes and times, which change from run to run."""
    return re.sub(r"\d+(\.\d+)? (s|ms|min|h|kB|MB|GB)\b", "N", line.replace(str(here), "."))


def beside(key: str) -> tuple[str, ...]:
    """What stands beside a key in both of its runs."""
    scratch = ("model.name=custom-nano", "training.max_steps=1") if key.startswith("model.architecture.") else ()
    return (*scratch, *FLIPS[key].get("beside", ()))


def flipped(key: str) -> str:
    return f"{key}={FLIPS[key]['flip']}"


# --- keys that show in a run's outputs
# ------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "data.num_workers": "test_data_num_workers_is_used",
    "training.compile": "test_training_compile_is_used",
    "evaluation.batch_size": "test_evaluation_batch_size_is_used",
    "tracking.project": "test_trackers_are_made_with_what_the_config_says",
    "tracking.tags": "test_trackers_are_made_with_what_the_config_says",
    "tracking.wandb_mode": "test_trackers_are_made_with_what_the_config_says",
    "tracking.wandb_entity": "test_trackers_are_made_with_what_the_config_says",
    "tracking.wandb_group": "test_trackers_are_made_with_what_the_config_says",
    "tracking.watch": "test_tracking_watch_is_used",
    "tracking.graph": "test_tracking_graph_is_used",
    "distributed.timeout_s": "test_distributed_timeout_s_is_used",
    "distributed.zero_stage": "test_the_keys_of_several_processes_are_used",
    "distributed.offload": "test_the_keys_of_several_processes_are_used",
    "distributed.deepspeed_config": "test_the_keys_of_several_processes_are_used",
}
"""Keys on which outputs do not depend, by promise (or that are too slow to run), with the test below that looks where
they are used.
"""

SHOWN = [key for key in FLIPS if key not in ELSEWHERE]


def test_every_key_is_looked_at():
    assert set(FLIPS) == set(LEAVES)
    assert len(SHOWN) + len(ELSEWHERE) == len(FLIPS) >= 93
    assert all(callable(globals()[test]) for test in ELSEWHERE.values())


def surroundings():
    """What stands beside the keys; where it stands beside one key alone, the campaign runs it twice."""
    keys = Counter(beside(key) for key in SHOWN)
    alone = pytest.mark.campaign
    return [
        pytest.param(around, marks=() if keys[around] > 1 else alone, id=" ".join(around)) for around in sorted(keys)
    ]


@pytest.mark.parametrize("around", surroundings())
def test_the_same_run_twice_shows_the_same(run_of, world, tmp_path, monkeypatch, tiny_model_folder, around):
    """Without this, anything that changes from run to run would hide every dead key."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with cache_in(tmp_path):
        again = fingerprint([f"model.name={tiny_model_folder}", *BASIS, *around], tmp_path)
    first = run_of(around)
    for part in first.keys() | again.keys():
        assert again.get(part) == first.get(part), part


@pytest.mark.parametrize("key", SHOWN)
def test_flipping_a_key_shows_in_the_run(run_of, key):
    """Q2."""
    before, after = run_of(beside(key)), run_of((*beside(key), flipped(key)))
    shown = [part for part in before.keys() | after.keys() if before.get(part) != after.get(part)]
    assert shown, f"{key} is dead: {flipped(key)} changes nothing"
    assert (key in REFUSED) == bool(before["error"] or after["error"]), (before["error"], after["error"])


# --- keys on which outputs do not depend, by promise: looked at where they are used
# ---------------------------------------------------


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A working folder with the files, and a cache of its own."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with cache_in(tmp_path):
        yield tmp_path


@pytest.fixture
def resolve(tiny_model_folder):
    return lambda *overrides: load_config(
        None, overrides=[f"model.name={tiny_model_folder}", *BASIS, *overrides], environ={}
    )


def test_data_num_workers_is_used(here, resolve, monkeypatch):
    """As many workers are started as the key says.

    The stand-ins end at once: then the rows are made here, and the run is the same.
    """
    (here / "many.jsonl").write_text("".join(row(f"asks {at}", f"answers {at}") for at in range(5 * 256 + 1)))
    started = []
    real = subprocess.Popen

    def stand_in(command, **keywords):
        started.append(command)
        return real([sys.executable, "-S", "-c", ""], **keywords)

    monkeypatch.setattr(subprocess, "Popen", stand_in)
    for workers, expected in (("0", 0), ("1", 0), (FLIPS["data.num_workers"]["flip"], 3)):
        started.clear()
        config = resolve("data.train=[many.jsonl]", f"data.num_workers={workers}", f"data.cache_dir=cache-{workers}")
        assert len(prepare(config, Options()).data.train) == 5 * 256 + 1
        assert len(started) == expected


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_training_compile_is_used(here, resolve):
    """Every block is handed to the compiler; that it gives the same numbers is for the tests of the engine, which take
    a while.
    """
    compiled = {}
    for value in ("false", FLIPS["training.compile"]["flip"]):
        config = resolve(f"training.compile={value}")
        devices, _ = open_devices(config.config, Options())
        prepared, _ = resolve_rates(Forecaster.for_this_machine(prepare(config, Options()), Options(), devices))
        setup = build_setup(prepared, Options(), devices)
        compiled[value] = [module._compiled_call_impl is not None for module in setup.model.model.layers]
    assert compiled == {"false": [False, False], "true": [True, True]}


def test_evaluation_batch_size_is_used(here, resolve):
    """Rows are seen one by one, and the held-out loss is the same."""
    forwards, losses = {}, {}
    for value in (None, FLIPS["evaluation.batch_size"]["flip"]):
        size = [f"evaluation.batch_size={value}"] if value else []
        with StopRequest() as stop:
            session = open_run(
                resolve(*beside("evaluation.batch_size"), *size, f"run.name=size-{value}"),
                Options(),
                stop,
                print_line=lambda _: None,
            )
            seen = []
            session.setup.model.get_input_embeddings().register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
            assert list(session.steps())
            losses[value] = session.result().eval_state.last_nll
        forwards[value] = len(seen)
    assert forwards["1"] - forwards[None] == 2  # two held-out rows, looked at before and after training
    assert losses["1"] == pytest.approx(losses[None], rel=1e-6)


@pytest.mark.parametrize("key", [key for key, test in ELSEWHERE.items() if test.startswith("test_trackers_are_made")])
def test_trackers_are_made_with_what_the_config_says(key):
    pytest.importorskip("wandb", reason="wandb is not installed")
    made = []
    for overrides in (beside(key), (*beside(key), flipped(key))):
        config = load_config(None, overrides=overrides, environ={}).config.tracking
        (tracker,) = choose_trackers(config, explicit=True, environ={})[0]
        made.append({name: value for name, value in vars(tracker).items() if not callable(value)})
    assert made[0] != made[1]


def test_tracking_watch_is_used(here, resolve):
    """Histograms of gradients, or of gradients and weights, reach TensorBoard at every step; the weights never notice
    (N12).
    """
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    names, weights = {}, {}
    for value in ("false", FLIPS["tracking.watch"]["flip"], "all"):
        result = train(resolve(*beside("tracking.watch"), f"tracking.watch={value}", f"run.name=watch-{value}"))
        events = accumulator.EventAccumulator(str(result.folder / "tensorboard"), size_guidance={"histograms": 0})
        events.Reload()
        names[value] = set(events.Tags()["histograms"])
        weights[value] = (result.folder / "checkpoints" / "final" / "model.safetensors").read_bytes()
        for name in names[value]:
            assert [event.step for event in events.Histograms(name)] == list(range(1, result.step + 1))
    assert names["false"] == set()
    gradients = names["gradients"]
    assert gradients
    assert all(name.startswith("gradients/") for name in gradients)
    assert names["all"] == gradients | {name.replace("gradients/", "weights/", 1) for name in gradients}
    assert weights["false"] == weights["gradients"] == weights["all"]


def test_tracking_graph_is_used(here, resolve):
    """TensorBoard gets the model's operations; the weights never notice (N12)."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    has_graph, weights = {}, {}
    for value in ("false", FLIPS["tracking.graph"]["flip"]):
        result = train(resolve(*beside("tracking.graph"), f"tracking.graph={value}", f"run.name=graph-{value}"))
        events = accumulator.EventAccumulator(str(result.folder / "tensorboard"))
        events.Reload()
        has_graph[value] = events.Tags()["graph"]
        weights[value] = (result.folder / "checkpoints" / "final" / "model.safetensors").read_bytes()
    assert has_graph == {"false": False, "true": True}
    assert weights["false"] == weights["true"]


def test_distributed_timeout_s_is_used(resolve, monkeypatch):
    """Two processes wait for each other as long as the key says."""
    import torch.distributed

    waits = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *_, timeout, **__: waits.append(timeout.total_seconds())
    )
    meetings = []

    def meet(*_, timeout):
        meetings.append(timeout.total_seconds())
        store = torch.distributed.HashStore()
        store.set("llmtune/0/1/here/1", '["there", "all", null]')  # the other process came, and is not seen again
        yield store, 0, 2

    monkeypatch.setattr("llmtune.engine.rendezvous.rendezvous", meet)
    monkeypatch.setattr("llmtune.engine.rendezvous.allow_long_waits", lambda _, timeout: waits.append(timeout))
    monkeypatch.setattr("llmtune.engine.rank_watch.CONNECT_S", 0.05)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for overrides in ((), (flipped("distributed.timeout_s"),)):
        open_devices(resolve(*overrides).config, Options(no_cuda=True))
    assert waits == [120.0, timedelta(seconds=120), 5.0, timedelta(seconds=5)]
    assert meetings == [120.0, 5.0]


def test_the_keys_of_several_processes_are_used(here, resolve):
    """In the settings of DeepSpeed's engine, and in the plan of what waits on the host."""
    (here / "ds.json").write_text('{"zero_optimization": {"sub_group_size": 1000}}')
    settings = {}
    for key in ("distributed.zero_stage", "distributed.deepspeed_config"):
        config = resolve("distributed.strategy=deepspeed", flipped(key)).config
        settings[key], _ = engine_settings(config, world_size=2, hidden_size=64, page_locked=False)
    zero = {key: value["zero_optimization"] for key, value in settings.items()}
    assert [one["stage"] for one in zero.values()] == [1, 3]
    assert [one.get("sub_group_size") for one in zero.values()] == [None, 1000]
    offloads = [
        resolve("distributed.strategy=fsdp", *words).config for words in ((), (flipped("distributed.offload"),))
    ]
    assert [division_of(config, 2).offload for config in offloads] == ["none", "all"]
