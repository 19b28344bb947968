"""Lays out one case of `tests/badinputs/*.yaml`, runs its command line, and says what came of it."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from llmtune.cli.main import main

FOLDER = Path(__file__).parent / "badinputs"


class Case(NamedTuple):
    """One bad input: how to lay it out, the command line, and the answer it must get."""

    id: str
    kind: str
    """Stem of the table it stands in."""
    command: str
    """Words as a shell would split them; {here}, {model}, {run}, {adapter}, {rows} and the values of `paths` are filled
    in afterwards.
    """
    code: int
    says: str
    """Regular expressions divided by ` & `; each must match stderr, whose runs of white space are taken as one space.
    """
    files: dict
    make: list
    environ: dict
    folder: str
    """Name of the working folder."""
    child: str
    """Empty for a call in this process, else a way of starting a process: `plain`, or a row of `CHILDREN`."""
    leaves: list
    """Patterns of what may be there afterwards that was not there before."""


class RowResult(NamedTuple):
    """What a command line did."""

    code: object
    out: str
    err: str
    new: list
    """Paths that appeared, disappeared or changed in the working folder, the temporary folder and the home."""


def cases() -> list[Case]:
    """Every case of every table."""
    found = []
    for table in sorted(FOLDER.glob("*.yaml")):
        content = yaml.safe_load(table.read_text(encoding="utf-8"))
        for row in content["cases"]:
            row = {**content.get("defaults", {}), **row}
            found.append(
                Case(
                    id=row.pop("id"),
                    kind=table.stem,
                    command=row.pop("command"),
                    code=row.pop("code"),
                    says=row.pop("says"),
                    files=row.pop("files", {}),
                    make=row.pop("make", []),
                    environ=row.pop("environ", {}),
                    folder=row.pop("folder", "here"),
                    child=row.pop("child", ""),
                    leaves=row.pop("leaves", []),
                )
            )
            assert not row, f"{table.name}: {found[-1].id} has unknown keys {sorted(row)}"
    return found


def copy(here, places, source, name):
    shutil.copytree(places[source], here / name)


def edit_json(here, places, name, changes):
    content = json.loads((here / name).read_text())
    content.update(changes)
    (here / name).write_text(json.dumps({key: value for key, value in content.items() if value != "--remove--"}))


def write_bytes(here, places, name, digits):
    (here / name).parent.mkdir(parents=True, exist_ok=True)
    (here / name).write_bytes(bytes.fromhex(digits))


def fill(here, places, name, size):
    """A file of `size` bytes without content that takes no room."""
    with (here / name).open("wb") as file:
        file.truncate(size)


def cut(here, places, pattern, size):
    for path in matches(here, pattern):
        with path.open("r+b") as file:
            file.truncate(size if size >= 0 else path.stat().st_size + size)


def flip(here, places, pattern, place):
    for path in matches(here, pattern):
        raw = bytearray(path.read_bytes())
        raw[place] ^= 1
        path.write_bytes(raw)


def remove(here, places, pattern):
    for path in matches(here, pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def rename(here, places, old, new):
    (here / old).rename(here / new)


def folder(here, places, name):
    (here / name).mkdir(parents=True)


def link(here, places, name, target):
    (here / name).symlink_to(target)


def pipe(here, places, name):
    os.mkfifo(here / name)


def repeat(here, places, name, text, times):
    (here / name).write_text(text * times)


def tensors(here, places, name, change):
    """Change weights: `{tensor: null}` takes one away, `{tensor: [shape]}` makes one of zeros, `{tensor: nan}` spoils a
    value.
    """
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(here / name)
    for key, value in change.items():
        if value is None:
            del weights[key]
        elif isinstance(value, list):
            weights[key] = torch.zeros(value)
        else:
            weights[key] = weights[key].clone()
            weights[key].view(-1)[3] = float(value)
    save_file(weights, here / name, metadata={"format": "pt"})


def seal(here, places, name):
    """Make the manifest of a checkpoint true again, as someone who edits a checkpoint on purpose would."""
    import hashlib

    path = here / name / "manifest.json"
    manifest = json.loads(path.read_text())
    for one, entry in manifest["files"].items():
        raw = (here / name / one).read_bytes()
        entry.update(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    path.write_text(json.dumps(manifest))


STEPS = {
    "copy": copy, "json": edit_json, "bytes": write_bytes, "fill": fill, "cut": cut, "flip": flip, "remove": remove, "rename": rename,  # noqa: E501
    "folder": folder, "link": link, "pipe": pipe, "repeat": repeat, "tensors": tensors, "seal": seal,
}  # fmt: skip


def matches(here, pattern):
    found = sorted(here.glob(pattern))
    assert found, f"nothing matches {pattern}"
    return found


def lay_out(case: Case, top: Path, places: dict) -> Path:
    """Make the working folder of a case under `top`."""
    here = top / case.folder
    here.mkdir(parents=True)
    for name, text in case.files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(filled(text, here, places), encoding="utf-8", newline="")
    for step, *arguments in case.make:
        STEPS[step](here, places, *arguments)
    return here


def filled(text: str, here: Path, places: dict) -> str:
    """Put the places of this machine into a text."""
    for key, value in {"here": here, **places}.items():
        text = text.replace("{" + key + "}", str(value))
    return text


def arguments_of(case: Case, here: Path, places: dict) -> list[str]:
    """The words of the command line."""
    return [filled(word, here, places) for word in shlex.split(case.command)]


def problems_in(err: str) -> set[str]:
    """Each problem of an error message, with its place where there are several."""
    first = re.search(r"^error: (.*)$", err, re.MULTILINE)
    if first is None or not re.fullmatch(r"\d+ problems", first[1]):
        return {first[1]} if first else set()
    return set(re.findall(r"^  (\S.*)$", err[first.end() :], re.MULTILINE))


def seen(*folders: Path) -> dict:
    """Every path below, with its size and time of change."""
    found = {}
    for top in folders:
        for root, names, files in os.walk(top):
            for name in (*names, *files):
                path = Path(root, name)
                about = path.lstat()
                found[path] = None if path.is_dir() else (about.st_size, about.st_mtime_ns)
    return found


def changes(before: dict, after: dict, case: Case, here: Path) -> list:
    """What is new, gone or other, without what the case allows."""
    allowed = {path for pattern in case.leaves for path in here.glob(pattern)}
    different = {path for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0)}
    return sorted(str(path) for path in different - allowed if not any(parent in allowed for parent in path.parents))


def run_here(case: Case, here: Path, places: dict, capsys, monkeypatch) -> tuple:
    """Run the command line in this process; returns code, stdout, stderr."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    try:
        main(arguments_of(case, here, places))
        code = "returned"
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


def start(case: Case, here: Path, places: dict) -> tuple:
    """Run the command line in a process of its own; returns code, stdout, stderr."""
    environ = {key: value for key, value in os.environ.items() if value != "--unset--"}
    words = [sys.executable, "-m", "llmtune", *arguments_of(case, here, places)]
    before = CHILDREN[case.child]
    done = subprocess.run(
        words,
        cwd=here,
        env=environ,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        preexec_fn=before,
        check=False,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


CHILDREN = {
    "plain": None,
    "closed stdin": lambda: os.close(0),
    "umask 077": lambda: os.umask(0o077),
    "umask 777": lambda: os.umask(0o777),
}


def one_line(text: str) -> str:
    """The text with every run of white space as one space, so that a pattern does not depend on where lines are folded."""  # noqa: E501
    return re.sub(r"\s+", " ", text)
