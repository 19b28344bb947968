"""What is written says how it is served: for each shape of result the exact lines, and none of a program that refuses
it.
"""

from __future__ import annotations

import json
import shlex

import pytest

from llmtune.deploy.usage import PROGRAMS, Result, adapter_result, usage
from llmtune.models.save import PromptDefaults

FOLDER = Result("folder", "my model", model_type="llama", fits_gguf=True)
PLAIN = {"r": 20, "lora_alpha": 32.0, "target_modules": ["q_proj"]}


def adapter(base="org/base", adds_rows=False, **options):
    return adapter_result("runs/a/checkpoints/final", {**PLAIN, **options}, base, adds_rows=adds_rows)


@pytest.mark.parametrize(
    ("result", "lines"),
    [
        (
            FOLDER,
            [
                "vllm serve 'my model'  # vLLM",
                "transformers serve 'my model'  # transformers",
                "mlx_lm.server --model 'my model'  # MLX",
                "llmtune export 'my model' --type q8_0 --output my-model.gguf  # a file for llama.cpp",
                "llmtune export 'my model' --to ollama --output my-model-ollama  # a folder for Ollama",
            ],
        ),
        (
            Result("folder", "m", PromptDefaults(template_args={"enable_thinking": False}), model_type="bloom"),
            [
                """vllm serve m --default-chat-template-kwargs '{"enable_thinking": false}'  # vLLM""",
                """transformers serve m --chat-template-kwargs '{"enable_thinking": false}'  # transformers""",
            ],
        ),
        (
            Result("gguf", "out/m.gguf"),
            [
                "llama-server -m out/m.gguf  # llama.cpp",
                "llama-quantize out/m.gguf out/m-q4_k_m.gguf Q4_K_M  # a K-quant",
            ],
        ),
        (
            Result("gguf", "m.gguf", PromptDefaults(template_args={"a": 1}), is_quantized=True),
            ["""llama-server -m m.gguf --chat-template-kwargs '{"a": 1}'  # llama.cpp"""],
        ),
        (
            Result("ollama", "out/Bot"),
            [
                "ollama create bot -f out/Bot/Modelfile && ollama run bot  # Ollama",
                "llama-server -m out/Bot/model.gguf  # llama.cpp",
            ],
        ),
        (
            adapter(),
            [
                "vllm serve org/base --enable-lora --max-lora-rank 32 --lora-modules "
                "tuned=runs/a/checkpoints/final  # vLLM",
                "llmtune merge-lora runs/a/checkpoints/final --output final-merged  # all the others",
            ],
        ),
        (adapter(base=None), []),
    ],
    ids=["folder", "folder with template arguments", "file", "quantized file", "ollama", "adapter", "from scratch"],
)
def test_each_shape_of_result_has_its_lines(result, lines):
    assert usage(result) == lines
    for line in lines:
        shlex.split(line, comments=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "rows of tokens"),
        ({"adds_rows": True}, "rows of tokens"),
        ({"alpha_pattern": {"q_proj": 4.0}}, "a rank or alpha for each layer"),
        ({"rank_pattern": {"q_proj": 4}}, "a rank or alpha for each layer"),
        ({"r": 513}, "ranks above 512"),
    ],
)
def test_an_adapter_that_vllm_refuses_or_reads_otherwise_is_merged_first(options, reason):
    (line,) = usage(adapter(**options))
    assert line.startswith("llmtune merge-lora runs/a/checkpoints/final --output final-merged  # first, because")
    assert f"no adapter with {reason}; then" in line


def test_the_rank_of_vllm_is_one_that_it_takes():
    ranks = [int(usage(adapter(r=r))[0].split("--max-lora-rank ")[1].split()[0]) for r in (1, 2, 16, 17, 300, 512)]
    assert ranks == [1, 8, 16, 32, 320, 512]


def test_no_shape_has_more_than_six_lines():
    for kind in {kind for _, kind, _ in PROGRAMS}:
        assert 0 < sum(kind == other for _, other, _ in PROGRAMS) <= 6


def test_what_is_written_carries_its_lines(make, tmp_path):
    """In the report with the path that was asked for, in the card with a name for the folder."""
    from llmtune.deploy.export import export
    from llmtune.deploy.merge import merge_lora

    base = make.base()
    merged = merge_lora(make.adapter(base), tmp_path / "merged")
    exported = export(str(tmp_path / "merged"), tmp_path / "out")
    for report, name in ((merged, "merged"), (exported, "out")):
        folder = tmp_path / name
        assert report.usage[0] == f"vllm serve {folder}  # vLLM"
        card = (folder / "README.md").read_text()
        assert "```bash\nvllm serve THIS_FOLDER  # vLLM\n" in card
        file = next(iter(folder.glob("*_report.json")))
        assert json.loads(file.read_text())["usage"] == report.usage
