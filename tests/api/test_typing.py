"""Issue 6: the package is typed, and importing it costs nothing."""

import subprocess
import sys

PROGRAM = """
from collections.abc import Mapping
from llmtune import Curve, Result, Stop, Trainer, load_config, train, train_single_model
from llmtune.engine.loop import StepResult

config = load_config("production", overrides={"model.name": "custom-small", "training.max_steps": 10})

def perplexity(step: StepResult) -> Mapping[str, float] | Stop | None:
    return Stop("low enough") if step.train_mean_nll < 1 else {"train_perplexity": 2.718281828 ** step.train_mean_nll}

class Mine(Trainer):
    def on_step(self, step: StepResult) -> Mapping[str, float] | None:
        return {"double": 2.0 * step.step}

with Mine(config, metrics=[perplexity]) as trainer:
    for step in trainer.steps():
        reveal_type(step)
        trainer.learning_rate = trainer.learning_rate / 2
        trainer.learning_rate = lambda done: 1e-3 / (1 + done)
        answer: str = trainer.generate("hello")[0].text
        loss: float = trainer.evaluate()["eval_mean_nll"]
result: Result = train(config)
reveal_type(result.metrics)
other, metrics = train_single_model(model_name="custom-tiny", config_type="test", max_samples=50, project_name="notebook-experiment")
reveal_type(other)
picture: Curve = other.curve
"""  # noqa: E501


LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "peft",
    "safetensors",
    "datasets",
    "pyarrow",
    "accelerate",
    "bitsandbytes",
    "wandb",
    "rich",
    "tensorboard",
    "psutil",
    "jinja2",
    "yaml",
    "zstandard",
)


# Parts of llmtune that no public name has a type of; reading them takes longer than everything else.
INNER = ("adapters", "deploy", "kernels", "models")


def test_a_users_program_passes_the_type_checker_in_strict_mode(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    # Our package is followed but not judged again (`mypy` over src does that); the libraries behind it are not read:
    # that takes a minute.
    names = (*LIBRARIES, *(f"llmtune.{name}" for name in INNER))
    skip = "follow_imports = skip\nfollow_imports_for_stubs = true\n"  # stubs are read where only the first is said
    skipped = "".join(f"[mypy-{name},{name}.*]\n{skip}" for name in names)
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nignore_missing_imports = true\nfollow_imports = silent\n{skipped}"
    )
    options = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path)]
    command = [sys.executable, "-m", "mypy", *options, str(tmp_path / "program.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False
    )  # here its two million objects would slow all later tests
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    revealed = [line.partition('"')[2].rstrip('"') for line in done.stdout.splitlines() if "Revealed type" in line]
    assert revealed == ["llmtune.engine.loop.StepResult", "dict[str, Any]", "llmtune.api.trainer.Trainer"]


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, llmtune; from llmtune import load_config; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
