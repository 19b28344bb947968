"""How far it is from the command to the gradient: own frames on the stack, and files of the package entered."""

import json
import os
import subprocess
import sys

from training_helpers import LORA, SMALL

MOST_FRAMES = 6
MOST_FILES = 130
"""The goal is 110."""

CHILD = """
import inspect, json, sys, threading
from pathlib import Path
from llmtune.cli.main import main
import llmtune, peft, torch, transformers.models.llama.modeling_llama  # here, where nobody watches: it takes a while

package = str(Path(llmtune.__file__).parent)
entered, depths, importing = set(), [], []
backward = torch.Tensor.backward

def watched(tensor, *arguments, **named):
    frame, own = sys._getframe(1), []
    while frame is not None:
        if frame.f_code.co_filename.startswith(package):
            own.append(Path(frame.f_code.co_filename).stem + "." + frame.f_code.co_name)
        frame = frame.f_back
    if "loop.train_steps" in own:
        depths.append(own)
    return backward(tensor, *arguments, **named)

def enter(frame, event, argument):
    name = frame.f_code.co_filename
    if frame.f_code.co_name == "<module>":
        importing.append(name) if event == "call" else event == "return" and importing.pop()
    is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # not the body of a module or a class, nor what it calls
    if event == "call" and is_function and name.startswith(package) and not importing:
        entered.add(name[len(package) + 1:])

torch.Tensor.backward = watched
threading.setprofile(enter)
sys.setprofile(enter)
try:
    main(sys.argv[2:])
except SystemExit as end:
    sys.setprofile(None)
    Path(sys.argv[1]).write_text(json.dumps({"code": end.code, "frames": depths, "files": sorted(entered)}))
"""


def test_from_main_to_backward_are_few_frames_and_few_files(tiny_model_folder, rows_file, tmp_path):
    words = [f"model.name={tiny_model_folder}", f"data.train={rows_file}", f"run.output_dir={tmp_path / 'runs'}"]
    words += [*LORA, *SMALL, "training.max_steps=3", f"data.cache_dir={tmp_path / 'cache'}"]
    seen = tmp_path / "seen.json"
    command = [sys.executable, "-c", CHILD, str(seen), "--offline", "train", *words]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=True, timeout=180)
    told = json.loads(seen.read_text())
    assert told["code"] == 0
    assert len(told["frames"]) >= 3
    print(told["frames"][0], len(told["files"]))  # shown by `pytest -rP`
    assert max(map(len, told["frames"])) <= MOST_FRAMES, told["frames"]
    print("\n".join(told["files"]))
    assert 50 < len(told["files"]) <= MOST_FILES, told["files"]
