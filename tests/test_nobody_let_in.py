"""P4, Q9: no file of any folder that is read is run, and an offline process opens no connection; a real training and
merge, counted.
"""

import pickle
import shutil

import pytest

from canaries import PICKLES, SCRIPTS, plant, run_guarded
from training_fixtures import rows_file  # noqa: F401

COMMANDS = """
from llmtune.cli.main import main
for words in {commands!r}:
    try:
        main(words)
    except SystemExit as end:
        print("ended", end.code)
"""


@pytest.mark.parametrize("name", [*PICKLES, *SCRIPTS])
def test_each_canary_leaves_its_mark_when_it_is_run(name, tmp_path):
    plant(tmp_path, tmp_path / "mark")
    if name in PICKLES:
        pickle.loads((tmp_path / name).read_bytes())
    else:
        exec((tmp_path / name).read_text())
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("code", "tries"),
    [
        ("import socket; socket.socket().connect(('192.0.2.1', 9))", "socket.connect 192.0.2.1"),
        (
            "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
            "socket.sendto 192.0.2.1",
        ),
        ("import socket; socket.getaddrinfo('host.invalid', 80)", "socket.getaddrinfo host.invalid"),
        ("import httpx; httpx.get('http://host.invalid/x')", "GET http://host.invalid/x HTTP/1.1"),
    ],
)
def test_the_guard_counts_what_is_tried(code, tries, tmp_path):
    done, tried = run_guarded(code, tmp_path, tmp_path)
    assert done.returncode != 0
    assert tried == [tries]


def test_without_offline_a_model_of_the_hub_is_asked_for(tmp_path):
    """So the law below can fail: the same commands do connect where they may."""
    commands = [["train", "--dry-run", "model.name=someone/model", "data.train=rows.jsonl"]]
    done, tried = run_guarded(COMMANDS.format(commands=commands), tmp_path, tmp_path, HOME=str(tmp_path))
    assert "ended 6" in done.stdout, done.stderr
    assert tried


def test_p4_q9_no_canary_fires_and_an_offline_training_and_merge_connect_to_nothing(
    tiny_model_folder,
    rows_file,  # noqa: F811
    tmp_path,
):
    here, mark = tmp_path / "here", tmp_path / "mark"
    folders = {name: here / name for name in ("model", "words", "data", "conf", "templates", "runs", "cache", "home")}
    shutil.copytree(tiny_model_folder, folders["model"])
    for name in ("words", "data", "conf", "templates", "runs", "cache", "home"):
        folders[name].mkdir()
    for path in folders["model"].iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special")):
            shutil.copy(path, folders["words"])
    shutil.copy(rows_file, folders["data"] / "rows.jsonl")
    template = next(iter(folders["words"].glob("chat_template.jinja")))
    shutil.copy(template, folders["templates"] / "own.jinja")
    (folders["conf"] / "tune.yaml").write_text(
        "model: {name: ./model, tokenizer: ./words, chat_template: templates/own.jinja}\n"
        "data: {train: data/rows.jsonl, test_size: 4}\n"
        "run: {name: r}\nadapter: {method: lora}\ntracking: {trackers: [jsonl, tensorboard, wandb]}\n"
        "training: {max_steps: 2, batch_size: 4}\ncheckpoint: {every_steps: 1}\nevaluation: {every_steps: 1}\n"
    )
    planted = sum(plant(folder, mark) for folder in (here, *folders.values()))
    environ = {"LLMTUNE_CACHE_DIR": str(folders["cache"]), "HOME": str(folders["home"]), "PYTHONPATH": ""}
    code = COMMANDS.format(commands=[["train", "--offline", "--config", "conf/tune.yaml"]])
    done, tried = run_guarded(code, tmp_path, here, **environ)
    assert done.stdout.count("ended 0") == 1, done.stdout + done.stderr
    assert "switched off" not in done.stderr
    planted += plant(here / "runs" / "r", mark) + plant(here / "runs" / "r" / "checkpoints", mark)
    taken = here / "taken"
    shutil.copytree(here / "runs" / "r" / "checkpoints" / "final", taken)
    planted += plant(taken, mark)
    asked = [
        ["merge-lora", "--offline", "taken", "--output", "merged"],
        ["generate", "--offline", "taken", "hello", "--max-new-tokens", "2"],
        ["evaluate", "--offline", "./model", "--data", "data/rows.jsonl"],
    ]
    done, more = run_guarded(COMMANDS.format(commands=asked), tmp_path, here, **environ)
    assert done.stdout.count("ended 0") == 3, done.stdout + done.stderr
    assert (here / "merged" / "model.safetensors").is_file()
    assert planted == 12 * (len(PICKLES) + len(SCRIPTS))
    assert not mark.exists()
    assert tried + more == []
