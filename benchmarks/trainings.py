"""A random model, rows of text, and the trainings over them, each a real command: what `many_gpus.py` measures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from workloads import SHAPES

__all__ = ["TINY", "Bench"]

TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
"""The shape of the model `tiny`, in float32."""

LONGEST_S = 120
"""Seconds after which a training that is to be ended unsaved is given up: then others have the rest of their stage."""


class Bench:
    """A random model, rows of text, and the trainings over them."""

    def __init__(self, folder: Path, devices: int, *, pretend: bool) -> None:
        self.folder, self.devices, self.pretend = folder, devices, pretend

    def model(self, shape: str) -> Path:
        """Write a random model of this shape, with a tokenizer of bytes, where it is not there yet."""
        import torch
        import transformers
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        path = self.folder / shape
        if path.exists():
            return path
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {name: number for number, name in enumerate(["<end>", *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        config = transformers.LlamaConfig(**{**(TINY if shape == "tiny" else SHAPES[shape]), "pad_token_id": 0})
        torch.manual_seed(0)
        dtype = torch.float32 if shape == "tiny" else torch.bfloat16
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        made.save_pretrained(path)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
        ).save_pretrained(path)
        return path

    def words(self, name: str, shape: str, tokens: int, steps: int, more: Sequence[str]) -> list[str]:
        """The words of a training on rows of about so many tokens, one for each device in a step."""
        rows = self.folder / f"rows-{tokens}.jsonl"
        if not rows.exists():
            text = "the same words in every row, and a number: "
            lines = [{"text": f"{number} " + (text * (tokens // len(text) + 1))[: tokens - 8]} for number in range(64)]
            rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        given = {
            "model.name": self.model(shape),
            "data.train": rows,
            "data.max_length": tokens,
            "data.test_size": 0,
            "run.output_dir": self.folder / "runs",
            "run.name": name.replace(",", "").replace(" ", "-"),
            "training.batch_size": 1,
            "training.gradient_accumulation_steps": self.devices,
            "training.max_steps": steps,
            "training.learning_rate": 1e-4,
            "tracking.trackers": "[jsonl]",
            "distributed.timeout_s": 60,
        }
        strategy = [word.format(devices=self.devices) for word in more]
        return [*(f"{key}={value}" for key, value in given.items()), *strategy]

    def command(self, verb: str, devices: int, words: Sequence[str]) -> list[str]:
        """The command line of a training on so many devices."""
        several = ["--devices", str(devices)] if devices > 1 else []
        return [sys.executable, "-m", "llmtune", verb, *several, *(["--no-cuda"] if self.pretend else []), *words]

    def trained(self, devices: int, words: Sequence[str], verb: str = "train") -> list[dict[str, float]]:
        """Train, and return the lines of the steps in the run's metrics."""
        done = subprocess.run(self.command(verb, devices, words), capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            raise RuntimeError(f"exit code {done.returncode}: {(lines or ['no message'])[0]}")
        return self.steps(words)

    def unsaved(self, devices: int, words: Sequence[str], steps: int) -> list[dict[str, float]]:
        """Train for so many steps, and return their lines; nothing is saved, and no run is left.

        A checkpoint of full tuning of 1B is 15 GB, which would take longer than the steps.
        """
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                self.command("train", devices, words), stdout=subprocess.DEVNULL, stderr=errors, text=True
            )
            deadline = time.monotonic() + LONGEST_S
            try:
                while len(lines := self.steps(words)) < steps and process.poll() is None:
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"{len(lines)} of {steps} steps after {LONGEST_S} s")
                    time.sleep(0.1)
            finally:
                _kill_all(process)
                shutil.rmtree(self.run_folder(words), ignore_errors=True)
            if len(lines) < steps:
                errors.seek(0)
                said = [line for line in errors.read().splitlines() if "error" in line.lower()]
                raise RuntimeError(f"exit code {process.returncode}: {(said or ['no message'])[0]}")
        return lines[:steps]

    def run_folder(self, words: Sequence[str]) -> Path:
        """The folder of the run of these words."""
        (name,) = [word.partition("=")[2] for word in words if word.startswith("run.name=")]
        return self.folder / "runs" / name

    def steps(self, words: Sequence[str]) -> list[dict[str, float]]:
        """What the run of these words has logged of its steps so far."""
        file = self.run_folder(words) / "metrics.jsonl"
        lines = map(json.loads, file.read_text().splitlines()) if file.exists() else []
        return [line for line in lines if "step_seconds" in line]


def _kill_all(process: subprocess.Popen[str]) -> None:
    """End a launcher and its processes at once: those of one that died by itself would save first."""
    if process.poll() is None:
        own = psutil.Process(process.pid)
        for one in (*own.children(recursive=True), own):
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
