"""Chat templates that come with llmtune, and templates read from a file."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from llmtune.errors import TokenizerError

__all__ = ["find_chat_template", "shipped_chat_templates"]


def shipped_chat_templates() -> dict[str, str]:
    """The chat templates that come with llmtune, by the name `model.chat_template` takes."""
    folder = resources.files("llmtune.models") / "templates"
    return {
        one.name.removesuffix(".jinja"): one.read_text("utf-8")
        for one in folder.iterdir()
        if one.name.endswith(".jinja")
    }


def find_chat_template(name_or_path: str) -> str:
    """The text of a shipped chat template, or of a file. Raises TokenizerError when it is neither."""
    shipped = shipped_chat_templates()
    return shipped[name_or_path] if name_or_path in shipped else _template_file(name_or_path, shipped)


def _template_file(wanted: str, shipped: dict[str, str]) -> str:
    path = Path(wanted).expanduser()
    try:
        if path.stat().st_size > 2**20:
            raise TokenizerError(
                f"`{wanted}` has more than a million bytes",
                where="model.chat_template",
                fix="name a Jinja chat template",
            )
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise TokenizerError(f"`{wanted}` is empty", where="model.chat_template", fix="name a Jinja chat template")
        return text
    except (OSError, ValueError) as error:
        near = get_close_matches(wanted, shipped, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise TokenizerError(
            f"`{wanted}` is no readable file and no shipped chat template",
            where="model.chat_template",
            fix=f"{hint}the shipped ones are {', '.join(sorted(shipped))}",
        ) from error
