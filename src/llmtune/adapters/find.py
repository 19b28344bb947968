"""Where an adapter lies, and which base it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llmtune.adapters.config_file import read_adapter_config, read_base_record
from llmtune.errors import AdapterError, LlmtuneError, ModelError
from llmtune.models.catalog import resolve
from llmtune.models.catalog_entry import ModelSource

__all__ = ["base_name_of", "find_adapter", "find_base", "find_result", "named_folder"]


def named_folder(name: Path | str, output_dir: Path | str) -> Path | None:
    """Return the folder that is named: as it stands, or that of a run in `output_dir`; None where there is neither."""
    return next((folder for folder in (Path(name), Path(output_dir) / name) if folder.is_dir()), None)


def find_result(folder: Path) -> Path | None:
    """Return what `folder` holds to be used, adapter or model: of a run the final one, else the best, else the newest
    checkpoint.

    None for a folder that is neither. Raises ModelError for a run that has saved nothing yet.
    """
    named = ("adapter_config.json", "config.json")
    found = next((one for one in _results_of(folder) if any((one / file).is_file() for file in named)), None)
    if found is None and (folder / "run.json").is_file():
        raise ModelError(
            "the run has saved nothing yet", where=str(folder), fix="wait for its first checkpoint, or resume it"
        )
    return found


def _results_of(source: Path) -> Iterator[Path]:
    """Yield where `source` (a run, a model, an adapter) may hold what can be used: itself, final, best, checkpoints
    from the newest.
    """
    yield source
    yield source / "checkpoints" / "final"
    yield source / "final"
    yield source / "checkpoints" / "best"
    yield from sorted(source.glob("checkpoints/step-*"), key=lambda path: (len(path.name), path.name), reverse=True)


def find_adapter(source: Path) -> Path:
    """Return the adapter's folder: `source` itself, or what its run produced (final, else best, else the newest
    checkpoint).

    Raises AdapterError when there is none.
    """
    if not source.is_dir():
        raise AdapterError(
            f"there is no folder `{source}`", where="RUN|ADAPTER", fix="give the folder of a run or of an adapter"
        )
    candidates = list(_results_of(source))
    found = next((folder for folder in candidates if (folder / "adapter_config.json").is_file()), None)
    if found is not None:
        return found
    whole = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
    if whole is not None:
        raise AdapterError(
            f"`{whole}` is a whole model: there is nothing to merge", where=str(source), fix="use it as it is"
        )
    raise AdapterError(
        "there is no adapter here",
        where=str(source),
        fix="give the folder of a run that trained an adapter, or an adapter's folder",
    )


def base_name_of(adapter: Path) -> str | None:
    """Return the name of the base as its user knew it; None where nothing is recorded."""
    name = read_base_record(adapter).get("base_name") or read_adapter_config(adapter).get("base_model_name_or_path")
    return str(name) if name else None


def find_base(adapter: Path, *, offline: bool = False) -> ModelSource:
    """Return the base an adapter was trained on, by the names on record.

    Raises AdapterError when none of them is to be found.
    """
    options, record = read_adapter_config(adapter), read_base_record(adapter)
    revision = record.get("base_revision") or options.get("revision")
    names = [
        name
        for name in (record.get("base_name"), record.get("base_path"), options.get("base_model_name_or_path"))
        if name
    ]
    refusal: LlmtuneError | None = None
    for name in dict.fromkeys(names):
        try:
            return resolve(name, revision, offline=offline)
        except ModelError as error:
            refusal = error
    known = f"`{names[0]}`" if names else "no base at all"
    raise AdapterError(
        f"the adapter names {known}, which is not to be found", where=str(adapter), fix="name its base with --base"
    ) from refusal
