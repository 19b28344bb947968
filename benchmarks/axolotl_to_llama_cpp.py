"""From a config of Axolotl to an answer of llama.cpp: import, train, merge, quantize, ask. Each step is a command.

    python benchmarks/axolotl_to_llama_cpp.py FOLDER [--server-python PYTHON]

FOLDER: takes config, run, merged model and file. Stopped, the same command goes on: the run resumes, and what is
finished is not made again. PYTHON: an interpreter that has `xllamacpp`, which carries llama.cpp's server; this one when
not given. Takes about as long as `scripts/quickstart`.

Exit code 1 where a key of the config has no equivalent, a prompt has other ids in llama.cpp than in training, or fewer
than 54 of the 60 held-out sentences are answered with their own record, letter by letter (the untuned model: none).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from llama_cpp import compare_answers, compare_ids, llama_cpp

from llmtune.models.tokenizer import load_tokenizer_folder

CONFIG = """\
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
datasets:
  - path: {rows}
    type: chat_template
    field_messages: messages
val_set_size: 0.05
sequence_len: 512
adapter: lora
lora_r: 16
lora_alpha: 32
lora_dropout: 0.0
lora_target_linear: true
micro_batch_size: 8
gradient_accumulation_steps: 1
num_epochs: 2
learning_rate: 0.001
lr_scheduler: linear
optimizer: adamw_torch
warmup_steps: 0
bf16: auto
logging_steps: 1
output_dir: {folder}/runs
seed: 42
"""
"""As a user of Axolotl writes it; the model is then taken from the installed package, which holds the same one."""

ROWS = Path(__file__).resolve().parents[1] / "example-data" / "records"
LEAST_RIGHT = 54


def llmtune(*words: object) -> None:
    """Run a command of llmtune, and end with its exit code where that is not 0."""
    command = [sys.executable, "-m", "llmtune", *map(str, words)]
    print("$ llmtune", *command[3:], flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def make_file(folder: Path) -> Path:
    """Import, train, merge and quantize, as far as `folder` has it not yet; returns the GGUF file."""
    config, run, merged, file = (folder / name for name in ("here.yaml", "runs/axolotl", "merged", "tuned-q8.gguf"))
    if not config.exists():
        text = CONFIG.format(rows=ROWS / "train.jsonl", folder=folder)
        (folder / "axolotl.yaml").write_text(text, encoding="utf-8")
        llmtune("config", "import", folder / "axolotl.yaml", "--output", config)
    model = "model.name=smollm2-135m-instruct"
    llmtune("train", "--config", config, "--name", run.name, "--resume", "auto", model)
    if not merged.exists():
        llmtune("merge-lora", run, "--output", merged)
    if not file.exists():
        llmtune("export", merged, "--output", file, "--type", "q8_0", "--data", ROWS / "heldout.jsonl")
    return file


def main() -> int:
    """Make the file, ask it, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--server-python", default=sys.executable)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    file = make_file(folder)
    tokenizer = load_tokenizer_folder(folder / "merged").tokenizer
    with llama_cpp(options.server_python, file, context=512) as address:
        texts = compare_ids(address, tokenizer)
        prompts, right, count = compare_answers(address, tokenizer, ROWS / "heldout.jsonl")
    print("\n".join(texts + prompts) or f"all texts and all {count} prompts have the ids of training in llama.cpp")
    print(f"{right} of {count} held-out sentences are answered with their own record")
    return 1 if texts or prompts or right < LEAST_RIGHT else 0


if __name__ == "__main__":
    raise SystemExit(main())
