"""The command lines that serve what was written, shown after a merge or an export and in the model card.

Each program is a row of `PROGRAMS`: what it serves, and its line. The flags are those of vLLM 0.27, transformers 5.23,
mlx-lm 0.31, llama.cpp b11549 and Ollama 0.32.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmtune.adapters.config_file import LoraOptions
from llmtune.deploy.gguf_architectures import refuse_unwritable
from llmtune.deploy.gguf_vocabulary import gguf_vocabulary
from llmtune.errors import LlmtuneError
from llmtune.models.save import PromptDefaults

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

__all__ = ["GGUF_NAME", "PROGRAMS", "Result", "adapter_result", "folder_result", "usage"]

GGUF_NAME = "model.gguf"
"""The file in a folder for Ollama."""

Kind = Literal["folder", "gguf", "ollama", "adapter", "lora"]


@dataclass(frozen=True)
class Result:
    """What was written, as far as it decides the programs that serve it."""

    kind: Kind
    path: str
    """As the reader of the lines names it."""
    defaults: PromptDefaults = field(default_factory=PromptDefaults)
    model_type: str = ""
    fits_gguf: bool = False
    """A folder that `llmtune export` writes as GGUF."""
    is_quantized: bool = False
    base: str | None = None
    """Of an adapter: what transformers loads its base from; None where it is stored nowhere."""
    rank: int = 0
    """The largest of an adapter."""
    merge_first: str = ""
    """Why no server takes the adapter as it is; '' where vLLM does."""

    @property
    def name(self) -> str:
        """A name for the result in other programs.

        >>> Result("gguf", "out/My model.gguf").name
        'my-model'
        """
        return Path(self.path).stem.lower().replace(" ", "-")


def usage(result: Result) -> list[str]:
    """Return one command line for each program that serves the result, its name in a comment.

    >>> usage(Result("folder", "my model", model_type="olmo"))
    ["vllm serve 'my model'  # vLLM", "transformers serve 'my model'  # transformers"]
    """
    lines = [(program, line(result)) for program, kind, line in PROGRAMS if kind == result.kind]
    return [f"{line}  # {program}" for program, line in lines if line is not None]


def folder_result(
    path: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, defaults: PromptDefaults
) -> Result:
    """Describe a model's folder."""
    try:
        refuse_unwritable(config)
        gguf_vocabulary(tokenizer, int(config.get_text_config().vocab_size))
    except LlmtuneError:
        return Result("folder", path, defaults, config.model_type)
    return Result("folder", path, defaults, config.model_type, fits_gguf=True)


def adapter_result(path: str, options: LoraOptions, base: str | None, *, adds_rows: bool) -> Result:
    """Describe an adapter. adds_rows: it was trained beside rows of the embedding that its base does not have."""
    reasons = {
        "DoRA": bool(options.get("use_dora")),
        "modules_to_save": bool(options.get("modules_to_save")),
        "rows of tokens": adds_rows or bool(options.get("trainable_token_indices")),
        "biases": bool(options.get("lora_bias")),
        # vLLM scales every layer by the one alpha and rank of the file.
        "a rank or alpha for each layer": bool(options.get("rank_pattern") or options.get("alpha_pattern")),
        f"ranks above {VLLM_RANKS[-1]}": options["r"] > VLLM_RANKS[-1],
    }
    reason = ", ".join(name for name, holds in reasons.items() if holds)
    return Result("adapter", path, base=base, rank=options["r"], merge_first=reason)


def _quoted(text: str) -> str:
    return shlex.quote(text)


def _with_arguments(command: str, flag: str, result: Result) -> str:
    """Append the arguments of the chat template in training: without them the prompt would be another one."""
    arguments = result.defaults.template_args
    return f"{command} {flag} {_quoted(json.dumps(dict(arguments)))}" if arguments else command


def _vllm(result: Result) -> str:
    return _with_arguments(f"vllm serve {_quoted(result.path)}", "--default-chat-template-kwargs", result)


def _transformers(result: Result) -> str:
    return _with_arguments(f"transformers serve {_quoted(result.path)}", "--chat-template-kwargs", result)


def _mlx(result: Result) -> str | None:
    if result.model_type not in MLX_TYPES:
        return None
    return _with_arguments(f"mlx_lm.server --model {_quoted(result.path)}", "--chat-template-args", result)


def _to_ollama(result: Result) -> str | None:
    output = f"{result.name}-ollama"
    fits = result.fits_gguf and not result.defaults.continues_text
    return f"llmtune export {_quoted(result.path)} --to ollama --output {_quoted(output)}" if fits else None


def _to_gguf(result: Result) -> str | None:
    command = f"llmtune export {_quoted(result.path)} --type q8_0 --output {_quoted(f'{result.name}.gguf')}"
    return command if result.fits_gguf else None


def _llama_server(result: Result) -> str:
    path = result.path if result.kind == "gguf" else str(Path(result.path) / GGUF_NAME)
    return _with_arguments(f"llama-server -m {_quoted(path)}", "--chat-template-kwargs", result)


def _k_quants(result: Result) -> str | None:
    target = str(Path(result.path).with_name(f"{Path(result.path).stem}-q4_k_m.gguf"))
    return None if result.is_quantized else f"llama-quantize {_quoted(result.path)} {_quoted(target)} Q4_K_M"


def _ollama(result: Result) -> str:
    name = _quoted(result.name)
    return f"ollama create {name} -f {_quoted(str(Path(result.path) / 'Modelfile'))} && ollama run {name}"


def _base_file(result: Result) -> str | None:
    return result.base and f"llmtune export {_quoted(result.base)} --output base.gguf"


def _llama_server_lora(result: Result) -> str:
    return f"llama-server -m base.gguf --lora {_quoted(result.path)}"


def _vllm_adapter(result: Result) -> str | None:
    if result.base is None or result.merge_first:
        return None
    rank = next(rank for rank in VLLM_RANKS if rank >= result.rank)
    modules = _quoted(f"tuned={result.path}")
    return f"vllm serve {_quoted(result.base)} --enable-lora --max-lora-rank {rank} --lora-modules {modules}"


def _merge(result: Result) -> str | None:
    if result.base is None:
        return None
    return f"llmtune merge-lora {_quoted(result.path)} --output {_quoted(f'{result.name}-merged')}"


def _merge_plainly(result: Result) -> str | None:
    return None if result.merge_first else _merge(result)


def _merge_first(result: Result) -> str | None:
    line = _merge(result) if result.merge_first else None
    return line and f"{line}  # first, because vLLM serves no adapter with {result.merge_first}; then"


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's `--max-lora-rank` takes."""

MLX_TYPES = frozenset({
    "cohere", "cohere2", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral",
    "mixtral", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm",
})  # fmt: skip
"""Values of `model_type` that mlx-lm loads, of those that are common here."""

Line = Callable[[Result], "str | None"]
PROGRAMS: tuple[tuple[str, Kind, Line], ...] = (
    ("vLLM", "folder", _vllm),
    ("transformers", "folder", _transformers),
    ("MLX", "folder", _mlx),
    ("a file for llama.cpp", "folder", _to_gguf),
    ("a folder for Ollama", "folder", _to_ollama),
    ("llama.cpp", "gguf", _llama_server),
    ("a K-quant", "gguf", _k_quants),
    ("Ollama", "ollama", _ollama),
    ("llama.cpp", "ollama", _llama_server),
    ("vLLM", "adapter", _vllm_adapter),
    ("all the others", "adapter", _merge_plainly),
    ("any server", "adapter", _merge_first),
    ("its base, once", "lora", _base_file),
    ("llama.cpp", "lora", _llama_server_lora),
)
"""(program, what it serves, its line; None where it does not serve this one)."""
