"""`prompt_defaults.json` beside a model: what training put around each prompt, for folders without their run's config.

transformers reads no such file: the model card says the same in words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmtune import durable
from llmtune.config.schema import DataConfig
from llmtune.errors import ModelError
from llmtune.models.scan import read_json_file

__all__ = ["PROMPT_DEFAULTS", "PromptDefaults", "prompt_defaults_of", "read_prompt_defaults", "write_prompt_defaults"]

PROMPT_DEFAULTS = "prompt_defaults.json"


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
