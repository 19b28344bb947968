"""Find the folder of an adapter or a model, and the base that an adapter was trained on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from llmtune.adapters.config_file import read_adapter_config, read_base_record
from llmtune.errors import AdapterError, LlmtuneError, ModelError, UsageError
from llmtune.models.catalog import resolve
from llmtune.models.catalog_entry import ModelSource

__all__ = [
    "base_name_of",
    "find_adapter",
    "find_base",
    "find_result",
    "find_result_named",
    "named_folder",
    "run_of",
]


def named_folder(name: Path | str, output_dir: Path | str) -> Path | None:
    """Return the folder `name`, or that of the run `name` in `output_dir`; None where neither exists.

    Raises UsageError for an empty name, which would be the working folder.
    """
    if name == "":
        fix = "name a run, an adapter or a model; a variable of the shell may be unset"
        raise UsageError("the name of the run or model is empty", "command line", fix)
    return next((folder for folder in (Path(name), Path(output_dir) / name) if folder.is_dir()), None)


def run_of(result: Path) -> Path | None:
    """Return the folder of the run that saved `result` (RUN/checkpoints/NAME, or RUN/final); None where there is none.

    >>> run_of(Path("nowhere/checkpoints/best")) is None
    True
    """
    path = result.absolute()
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return folder if (folder / "run.json").is_file() else None


def find_result(folder: Path, checkpoint: str | None = None) -> Path | None:
    """Return the folder with the adapter or model to use in `folder`, which is one itself or holds a run.

    Of a run that is the final one, else the best, else the newest checkpoint; or `checkpoint`: `final`, `best`, `last`
    (the newest checkpoint) or `step-N`. None for a folder of another kind. Raises ModelError for a run that has saved
    nothing yet, UsageError for a checkpoint that is not there.
    """
    if checkpoint is not None:
        return _named_checkpoint(folder, checkpoint)
    result = next((path for path in _candidates(folder) if _is_result(path)), None)
    if result is None and (folder / "run.json").is_file():
        raise ModelError(
            "the run has saved nothing yet", where=str(folder), fix="wait for its first checkpoint, or resume it"
        )
    return result


def find_result_named(name: Path | str, output_dir: Path | str, checkpoint: str | None) -> Path | None:
    """Return the adapter or model of RUN|ADAPTER|MODEL where it is a folder here or a run's name, else None.

    Raises ModelError for a run that has saved nothing yet, UsageError for a checkpoint that is not there.
    """
    folder = named_folder(name, output_dir)
    if folder is not None:
        return find_result(folder, checkpoint)
    if checkpoint is not None:
        raise UsageError(f"`{name}` is no run here", "--checkpoint", "name a run (folder or name), or leave it out")
    return None


def _is_result(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))


def _named_checkpoint(folder: Path, name: str) -> Path:
    """The result of this name in the run `folder`. Raises UsageError where there is no run, or no such result."""
    if not (folder / "run.json").is_file():
        problem = f"`{folder}` is no run, so it has no checkpoints"
        raise UsageError(problem, "--checkpoint", "leave it out, or name a run")
    found = {path.name: path for path in reversed(list(_candidates(folder))) if path != folder and _is_result(path)}
    steps = [path for path_name, path in found.items() if path_name.startswith("step-")]
    step = name.removeprefix("step-")
    wanted = f"step-{int(step):06d}" if step.isdecimal() else name
    path = steps[-1] if name == "last" and steps else found.get(wanted)
    if path is None:
        there = ", ".join([*(["last"] if steps else []), *reversed(found)])
        fix = f"choose one of: {there}" if found else "the run has saved nothing yet; `llmtune resume` goes on with it"
        raise UsageError(f"the run has no checkpoint `{name}`", str(folder), fix)
    return path


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield the places of a usable adapter or model: the folder itself, final, best, checkpoints from the newest."""
    yield folder
    yield folder / "checkpoints" / "final"
    yield folder / "final"
    yield folder / "checkpoints" / "best"
    # By length first: step-1000000 is newer than step-999999.
    yield from sorted(folder.glob("checkpoints/step-*"), key=lambda path: (len(path.name), path.name), reverse=True)


def find_adapter(source: Path) -> Path:
    """Return the adapter's folder: `source` itself, or what its run saved (final, else best, else the newest).

    Raises AdapterError when there is none.
    """
    if not source.is_dir():
        raise AdapterError(
            f"there is no folder `{source}`", where="RUN|ADAPTER", fix="give the folder of a run or of an adapter"
        )
    candidates = list(_candidates(source))
    adapter = next((folder for folder in candidates if (folder / "adapter_config.json").is_file()), None)
    if adapter is not None:
        return adapter
    model = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
    if model is not None:
        raise AdapterError(
            f"`{model}` is a whole model: there is nothing to merge", where=str(source), fix="use it as it is"
        )
    raise AdapterError(
        "there is no adapter here",
        where=str(source),
        fix="give the folder of a run that trained an adapter, or an adapter's folder",
    )


def base_name_of(adapter: Path) -> str | None:
    """Return the name of the base as in the run's config, else as in the adapter's; None where nothing is recorded."""
    record, options = read_base_record(adapter), read_adapter_config(adapter)
    return record.get("base_name") or options.get("base_model_name_or_path") or None


def find_base(adapter: Path, *, offline: bool = False) -> ModelSource:
    """Return the base an adapter was trained on, by the recorded names.

    Raises AdapterError when none of them can be found.
    """
    options, record = read_adapter_config(adapter), read_base_record(adapter)
    revision = record.get("base_revision") or options.get("revision")
    recorded = (record.get("base_name"), record.get("base_path"), options.get("base_model_name_or_path"))
    names = [name for name in recorded if name]
    refusal: LlmtuneError | None = None
    # The name that the user wrote first: recorded paths are of the machine that trained.
    for name in dict.fromkeys(names):
        try:
            return resolve(name, revision, offline=offline)
        except ModelError as error:
            refusal = error
    known = f"`{names[0]}`" if names else "no base at all"
    # For every command: only those that write a model have --base.
    merge = f"llmtune merge-lora {shlex.quote(str(adapter))} --base FOLDER --output MERGED"
    raise AdapterError(
        f"the adapter names {known}, which is not to be found",
        where=str(adapter),
        fix=f"put it back, or merge with it where it is now, and use the result: `{merge}`",
    ) from refusal
