"""wandb, for real: offline into the run folder, and online against servers that refuse, hang or are not there (P11)."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("wandb", reason="wandb is not installed")

from llmtune.tracking import wandb as llmtune_wandb

SCRIPT = """
import json, random, sys, time
from pathlib import Path
from llmtune.tracking import Histogram, RunInfo, TrackerQueue
from llmtune.tracking.wandb import WandbTracker
folder, mode, start_step, timeout_s = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
info = RunInfo(name="tiny-test-20260101", folder=folder, total_steps=4, start_step=start_step, model="someone/tiny", config_name="test",
               tags=("mine",), config={"training": {"batch_size": 2}}, parameters={"total": 100, "trained": 10},
               architecture={"class": "LlamaForCausalLM"}, modules={"q_proj": 10},
               origins={"training.batch_size": "c.yaml:3"}, ledger={"train": {"used": 7}})
said, exit_function, hook = [], sys.exit, sys.excepthook
def generators():
    if mode != "offline" or start_step:  # importing torch takes longer than the rest, and one run shows it
        return None
    import numpy, torch
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
state = generators()
tracked = TrackerQueue([WandbTracker("a-project", mode=mode or None, entity="us", group="trials", print_line=said.append)], print_line=said.append)
began = time.perf_counter()
tracked.start(info)
for step in range(start_step + 1, 5):
    tracked.log(step, {"step": step, "train_mean_nll": 2.0 / step, "learning_rate": 1e-4})
tracked.log(4, {"eval_mean_nll": 0.5})
tracked.samples(4, [{"prompt": "p", "text": "an answer"}])
tracked.histograms(4, {"gradients/w": Histogram((1, 2), (0.0, 1.0, 2.0), 1.5)})
steps_s = time.perf_counter() - began
report, = tracked.finish("finished", timeout_s=timeout_s)
unchanged = state == generators() if state else None
hooks = sys.exit is exit_function and sys.excepthook is hook
print(json.dumps({"steps_s": steps_s, "failure": report.failure, "said": said, "rng_unchanged": unchanged, "hooks_unchanged": hooks}))
"""  # noqa: E501


def run(folder, mode, *, start_step=0, timeout_s=20.0, **environ):
    """Track four steps in a process of their own; return what it found, and how long all of it took."""
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment = {
        **kept,
        "HOME": str(folder.parent),
        "WANDB_CONFIG_DIR": str(folder.parent),
        "NETRC": str(folder.parent / "netrc"),
        **environ,
    }
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), mode, str(start_step), str(timeout_s)],
        env=environment, capture_output=True, text=True, timeout=100, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout), time.perf_counter() - began


def records_of(folder):
    """Return all of wandb's own records of the runs in `folder`, in the order they were written."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            records.append(record)
    return records


def log_records(data):
    """Read LevelDB's log format: blocks of 32 KiB; a piece is crc (4 bytes), length (2), kind (1: whole, 2: first, 3:
    middle, 4: last).
    """
    whole, at = b"", 7  # what comes before is wandb's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if kind == 0:
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def history_of(records):
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb") / "a run"
    found, _ = run(
        folder,
        "offline",
        timeout_s=60,
        WANDB_API_KEY="canary0123456789canary0123456789canary012",
        HF_TOKEN="hf_canary0123456789",
        WANDB_X_STATS_SAMPLING_INTERVAL="0.1",
    )
    return folder, found


def test_an_offline_run_lies_in_the_run_folder_with_name_project_tags_and_config(offline):
    folder, found = offline
    assert found["failure"] is None
    records = records_of(folder)
    (made,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert made.display_name == "tiny-test-20260101"
    assert made.project == "a-project"
    assert list(made.tags) == ["tiny", "test", "llmtune", "mine"]
    config = {update.key: json.loads(update.value_json) for update in made.config.update}
    assert config["training"] == {"batch_size": 2}
    assert config["parameters"] == {"total": 100, "trained": 10}
    assert config["architecture"] == {"class": "LlamaForCausalLM"}
    assert config["modules"] == {"q_proj": 10}
    assert config["origins"] == {"training.batch_size": "c.yaml:3"}
    assert config["ledger"] == {"train": {"used": 7}}
    assert (made.entity, made.run_group) == ("us", "trials")
    assert any("wandb sync" in line for line in found["said"])


def test_an_offline_run_holds_every_step_the_samples_and_the_histograms(offline):
    history = history_of(records_of(offline[0]))
    losses = {line["step"]: line["train/mean_nll"] for line in history if "train/mean_nll" in line}
    assert losses == {1: 2.0, 2: 1.0, 3: 2.0 / 3, 4: 0.5}
    assert [line["eval/mean_nll"] for line in history if "eval/mean_nll" in line] == [0.5]
    (table,) = offline[0].glob("wandb/offline-run-*/files/media/table/samples*.json")
    assert json.loads(table.read_text()) == {"columns": ["step", "prompt", "answer"], "data": [[4, "p", "an answer"]]}
    assert any("gradients/w/values" in line for line in history)


def test_an_offline_run_holds_wandb_s_own_figures_of_the_machine_and_of_this_process(offline):
    figures = [
        {item.key: json.loads(item.value_json) for item in record.stats.item}
        for record in records_of(offline[0])
        if record.WhichOneof("record_type") == "stats"
    ]
    named = {name: [float(line[name]) for line in figures if name in line] for line in figures for name in line}
    assert 0 < max(named["memory_percent"]) <= 100
    assert 50 < max(named["proc.memory.rssMB"]) < 4096  # a Python that imported torch, in MB
    assert any(name.startswith("cpu") for name in named), sorted(named)


def test_no_secret_of_the_environment_reaches_a_tracker_file(offline):
    files = [path for path in offline[0].rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert b"canary" not in path.read_bytes(), path


def test_wandb_draws_no_random_numbers_and_leaves_no_hooks(offline):
    """N12: observers change nothing."""
    assert offline[1]["rng_unchanged"]
    assert offline[1]["hooks_unchanged"]


def test_a_resumed_run_goes_on_under_the_same_id(offline):
    folder, _ = offline
    run(folder, "offline", start_step=2)
    ids = {record.run.run_id for record in records_of(folder) if record.WhichOneof("record_type") == "run"}
    assert ids == {(folder / "wandb" / "run-id.txt").read_text().strip()}


def test_disabled_writes_nothing(tmp_path):
    found, _ = run(tmp_path / "run", "disabled")
    assert found["failure"] is None
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["run-id.txt"]


def test_the_mode_of_the_environment_holds_when_the_config_names_none(tmp_path):
    found, _ = run(tmp_path / "run", "", WANDB_MODE="offline")
    assert found["failure"] is None
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))


def test_online_without_a_key_is_switched_off_at_once_and_never_asks(tmp_path):
    found, took = run(tmp_path / "run", "online", WANDB_BASE_URL="http://127.0.0.1:9")
    assert "wandb has no API key" in found["failure"]
    assert took < 30


def test_the_key_of_an_env_file_is_used_and_stays_out_of_the_netrc(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("OTHER=1\nexport WANDB_API_KEY='from-a-file'\n")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.delenv("WANDB_API_KEY")
    seen = []

    class Wandb:
        def login(self, prompt):
            seen.append(os.environ.get("WANDB_API_KEY"))
            return True

    llmtune_wandb.WandbTracker("p", mode="online")._log_in(Wandb())
    assert seen == ["from-a-file"]
    assert [path.name for path in tmp_path.iterdir()] == [".env"]
    monkeypatch.setenv("WANDB_API_KEY", "of-the-environment")
    llmtune_wandb.WandbTracker("p", mode="online")._log_in(Wandb())
    assert seen[1] == "of-the-environment"


class Refuser(BaseHTTPRequestHandler):
    status = 500

    def do_POST(self):
        self.send_response(self.status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST  # noqa: N815

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_server_that_refuses_does_not_hold_up_a_run(tmp_path, status):
    handler = type("Handler", (Refuser,), {"status": status})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found, took = run(
            tmp_path / "run",
            "online",
            timeout_s=2,
            WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}",
            WANDB_API_KEY="a" * 40,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert found["failure"] is not None
    assert found["steps_s"] < 0.5
    assert took < 30


def test_a_server_that_never_answers_does_not_hold_up_a_run(tmp_path):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        found, took = run(tmp_path / "run", "online", timeout_s=2, WANDB_BASE_URL=url, WANDB_API_KEY="a" * 40)
    assert found["failure"] is not None
    assert found["steps_s"] < 0.5
    assert took < 30


def test_a_thread_of_wandb_s_that_fails_prints_nothing_and_any_other_still_does(monkeypatch):
    """P11."""
    printed = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: printed.append(arguments.thread.name))
    llmtune_wandb._quiet_threads()
    for name in ("wandb-ServiceFinalizer", "mine"):
        thread = threading.Thread(target=lambda: 1 / 0, name=name)
        thread.start()
        thread.join()
    assert printed == ["mine"]
