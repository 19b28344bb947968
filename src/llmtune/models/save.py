"""Write a model with its tokenizer, chat template and generation settings in the formats of transformers.

Every function writes into a staging folder that the caller commits (see `durable.commit_folder`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmtune import durable
from llmtune.common.decisions import Decision
from llmtune.config.schema import Config, DataConfig
from llmtune.errors import CheckpointError, ModelError, Problem
from llmtune.models.parameters import find_score_head
from llmtune.models.read_config import translate_save_errors
from llmtune.models.scan import read_json_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "MAX_SHARD_BYTES",
    "PROMPT_DEFAULTS",
    "PromptDefaults",
    "other_prompts_of_base",
    "prompt_defaults_of",
    "read_prompt_defaults",
    "restore_weights",
    "write_generation_config",
    "write_model",
    "write_prompt_defaults",
    "write_tokenizer",
]


MAX_SHARD_BYTES = 5_000_000_000
"""Largest weight file, as transformers cuts them by default; hubs and proxies refuse or drop larger ones."""


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    stop_token_ids: Sequence[int] = (),
) -> None:
    """Write a model as transformers and vLLM read it: config, safetensors, tokenizer, generation config.

    state: the model's tensors by name, in their full shapes, where they were gathered already. stop_token_ids: all
    tokens that end an answer. Raises MachineError when the system refuses to write.
    """
    before = model.config.dtype
    with translate_save_errors(folder):
        model.save_pretrained(
            str(folder), state_dict=model.state_dict() if state is None else dict(state), max_shard_size=MAX_SHARD_BYTES
        )
    model.config.dtype = before  # save_pretrained replaces it by its name; saving must change nothing (N12)
    write_generation_config(model, tokenizer, stop_token_ids, folder)
    write_tokenizer(tokenizer, folder)


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer and its chat template as `AutoTokenizer.from_pretrained` reads them.

    Raises MachineError when the system refuses to write.
    """
    with translate_save_errors(folder):
        tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    # How the tokenizer was opened, a path of this machine among it, is no part of it.
    traces = ("is_local", "local_files_only", "name_or_path")
    content = {key: value for key, value in read_json_file(path).items() if key not in traces}
    # transformers leaves it out, and by it reads the spaces of a Llama tokenizer: without it, other ids.
    legacy = vars(tokenizer).get("legacy")
    durable.write_json(path, content if legacy is None else content | {"legacy": legacy})


def restore_weights(
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    *,
    shape: Callable[[torch.Tensor], torch.Size] = lambda parameter: parameter.shape,
    opened: Callable[[torch.Tensor], AbstractContextManager[object]] = lambda _: nullcontext(),
) -> None:
    """Put trained weights back, bit for bit.

    parameters: the trained ones by name. tensors: likewise. shape: gives that of the whole parameter. opened: the
    context in which one can be overwritten. Raises CheckpointError unless names, shapes and types are exactly those of
    the trained weights.
    """
    problems = [
        Problem(f"the weight `{name}` is missing in the checkpoint")
        for name in sorted(parameters.keys() - tensors.keys())[:3]
    ]
    problems += [
        Problem(f"the checkpoint has a weight `{name}` that is not trained here")
        for name in sorted(tensors.keys() - parameters.keys())[:3]
    ]
    for name in sorted(parameters.keys() & tensors.keys()):
        parameter, saved = parameters[name], tensors[name]
        if shape(parameter) != saved.shape or parameter.dtype != saved.dtype:
            stored = f"{saved.dtype} {tuple(saved.shape)} in the checkpoint"
            problems.append(Problem(f"`{name}` is {stored}, {parameter.dtype} {tuple(shape(parameter))} here"))
    if problems:
        raise CheckpointError.all(
            problem._replace(fix="resume with the config the run was started with") for problem in problems[:6]
        )
    for name, parameter in parameters.items():
        with opened(parameter), torch.no_grad():
            parameter.copy_(tensors[name])


def write_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stop_token_ids: Sequence[int], folder: Path
) -> None:
    """Write generation_config.json with every token that ends an answer, so that other programs stop there too.

    A model that gives scores answers nothing, and gets none.
    """
    if find_score_head(model) is not None:
        return
    generation = copy.deepcopy(model.generation_config)
    published = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    candidates = (*stop_token_ids, *published, tokenizer.eos_token_id)
    ids = list(dict.fromkeys(token for token in candidates if token is not None))
    generation.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else generation.bos_token_id
    durable.write_text(folder / "generation_config.json", generation.to_json_string())


PROMPT_DEFAULTS = "prompt_defaults.json"
"""Lies beside a model whose run is not there. transformers does not read it: the model card says the same in words."""


@dataclass(frozen=True)
class PromptDefaults:
    """How the prompts of a model are written, where its chat template alone does not say it."""

    system: str | None = None
    """System message of conversations that have none (`data.system`)."""

    template_args: Mapping[str, object] = field(default_factory=dict)
    """Arguments of the chat template (`data.template_args`)."""

    parse_control_tokens: bool = False
    """Content that spells a control token becomes that token (`data.parse_control_tokens`)."""

    continues_text: bool = False
    """It was trained on plain texts, so a prompt is continued without the chat template."""

    def described(self) -> str:
        """What differs from a plain chat, for people; '' where nothing does.

        >>> PromptDefaults("Be brief.", {"enable_thinking": False}).described()
        'system prompt "Be brief.", template arguments {"enable_thinking": false}'
        """
        parts = []
        if self.system is not None:
            parts.append(f"system prompt {json.dumps(self.system, ensure_ascii=False)}")
        if self.template_args:
            parts.append(f"template arguments {json.dumps(self.template_args, ensure_ascii=False)}")
        if self.parse_control_tokens:
            parts.append("control tokens in content are parsed")
        if self.continues_text:
            parts.append("prompts are continued as plain text")
        return ", ".join(parts)


def prompt_defaults_of(data: DataConfig, detected_formats: Sequence[str]) -> PromptDefaults:
    """How a run writes prompts. detected_formats: those of its files, where the config left the format open."""
    formats = [data.format] if data.format != "auto" else detected_formats
    return PromptDefaults(
        data.system, dict(data.template_args), data.parse_control_tokens, bool(formats) and formats[-1] == "text"
    )


def write_prompt_defaults(folder: Path, defaults: PromptDefaults) -> None:
    """Write the file, or none where nothing differs. Raises MachineError when the system refuses to write."""
    if defaults != PromptDefaults():
        durable.write_json(folder / PROMPT_DEFAULTS, asdict(defaults))


def read_prompt_defaults(folder: Path) -> PromptDefaults:
    """Read the file of a model's folder; the defaults where it has none.

    Raises ModelError for a file that holds something else.
    """
    path = folder / PROMPT_DEFAULTS
    if not path.is_file():
        return PromptDefaults()
    content = read_json_file(path)
    if not isinstance(content, dict):
        raise ModelError(f"`{PROMPT_DEFAULTS}` holds no mapping", where=str(path), fix="delete the file")
    defaults = PromptDefaults(**{key: content[key] for key in PromptDefaults.__dataclass_fields__ if key in content})
    is_right = (
        isinstance(defaults.system, str | None)
        and isinstance(defaults.template_args, dict)
        and isinstance(defaults.parse_control_tokens, bool)
        and isinstance(defaults.continues_text, bool)
    )
    if not is_right:
        fix = "delete the file, or write it as `llmtune merge-lora` does"
        raise ModelError(f"`{PROMPT_DEFAULTS}` holds values of the wrong type", where=str(path), fix=fix)
    return defaults


def other_prompts_of_base(config: Config) -> Iterator[Decision]:
    """A decision where the model was trained with other prompts than this run will give it."""
    folder = Path(config.adapter.start_from or config.model.name)
    if not folder.is_dir():
        return
    before = read_prompt_defaults(folder)
    now = PromptDefaults(config.data.system, dict(config.data.template_args), config.data.parse_control_tokens)
    if (before.system, dict(before.template_args)) not in ((None, {}), (now.system, dict(now.template_args))):
        reason = (
            f"{folder.name} was trained with {before.described()}; set data.system and data.template_args to keep that"
        )
        yield Decision("data.system", now.described() or "none", reason)
