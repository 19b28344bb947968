"""The chat templates shipped with llmtune, and templates read from a file."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import resources

from llmtune.common.environment import home_expanded
from llmtune.errors import TokenizerError

__all__ = ["find_chat_template", "shipped_chat_templates"]


def shipped_chat_templates() -> dict[str, str]:
    """Return the shipped chat templates by the name that `model.chat_template` takes."""
    folder = resources.files("llmtune.models") / "templates"
    files = [file for file in folder.iterdir() if file.name.endswith(".jinja")]
    return {file.name.removesuffix(".jinja"): file.read_text("utf-8") for file in files}


def find_chat_template(name_or_path: str) -> str:
    """Return the text of a shipped chat template or of a file. Raises TokenizerError when it is neither."""
    shipped = shipped_chat_templates()
    if name_or_path in shipped:
        return shipped[name_or_path]
    where, fix = "model.chat_template", "name a Jinja chat template"
    path = home_expanded(name_or_path)
    try:
        if path.stat().st_size > 2**20:  # a mistaken path may name the weights
            raise TokenizerError(f"`{name_or_path}` has more than a million bytes", where=where, fix=fix)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        near = get_close_matches(name_or_path, shipped, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise TokenizerError(
            f"`{name_or_path}` is no readable file and no shipped chat template",
            where=where,
            fix=f"{hint}the shipped ones are {', '.join(sorted(shipped))}",
        ) from error
    if not text.strip():
        raise TokenizerError(f"`{name_or_path}` is empty", where=where, fix=fix)
    return text
