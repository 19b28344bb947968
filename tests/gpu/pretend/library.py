"""The library of `device.cpp`: built once for a version of torch, and loaded before torch is imported."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile

SOURCE = Path(__file__).with_name("device.cpp")
FOLDER = Path(__file__).resolve().parents[3] / "build"
FLAGS = ("-shared", "-fPIC", "-O1", "-std=c++20", "-D_GLIBCXX_USE_CXX11_ABI=1")


def compiler() -> str | None:
    """The C++ compiler, None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def build() -> Path:
    """Compile the library, or find what an earlier run of the tests has left; about 5 s where it is compiled."""
    torch = Path(find_spec("torch").submodule_search_locations[0])  # not imported
    facts = (SOURCE.read_bytes(), version("torch"), str(torch), FLAGS)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    library = FOLDER / f"pretend-cuda-{digest}.so"
    if library.exists():
        return library
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    links = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    FOLDER.mkdir(exist_ok=True)
    with NamedTemporaryFile(suffix=".so", dir=FOLDER, delete=False) as made:  # two test processes may build at once
        command = [compiler(), *FLAGS, *includes, str(SOURCE), *links, "-o", made.name]
    subprocess.run(command, check=True, capture_output=True, text=True)
    Path(made.name).rename(library)
    return library


def load() -> ctypes.CDLL:
    """Load the library; torch must not have been imported, because it makes its hooks once."""
    assert "torch" not in sys.modules, "torch was imported before the pretend device"
    library = ctypes.CDLL(str(build()))
    assert library.pretend_register() == 1
    library.pretend_limit_pinned.argtypes = [ctypes.c_size_t]
    import torch  # noqa: F401

    library.pretend_register()  # once more: a build with CUDA has just put its own guard there
    return library
