"""Files that come with llmtune (`configs/`, `example-data/`): in the installed package, or in the source checkout."""

from __future__ import annotations

from pathlib import Path

__all__ = ["shipped_path", "shipped_presets"]


def shipped_path(relative: str) -> Path:
    """Return the path of a shipped file or folder such as `configs/test.yaml`; it need not exist.

    The installed package has them under `_shipped/`, a source checkout at its root.
    """
    package = Path(__file__).parents[1]
    installed = package / "_shipped"
    return (installed if installed.is_dir() else package.parent.parent) / relative


def shipped_presets() -> dict[str, Path]:
    """Return the shipped presets by name."""
    return {path.stem: path for path in sorted(shipped_path("configs").glob("*.yaml"))}
