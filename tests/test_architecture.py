"""The rules of the house: ranks of folders, fences around libraries, sizes, and the calls forbidden everywhere (P4)."""

import ast
import functools
import importlib.machinery
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "llmtune"


def load_script(name):
    """Import a Python file of scripts/, whose names have no ending."""
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "scripts" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module
    loader.exec_module(module)
    return module


house = load_script("house")
# Most rules ask for the imports of the same modules, and each asks all of them.
house.imports = functools.cache(lambda tree, find=house.imports: tuple(find(tree)))


@functools.cache
def modules():
    """Every module of the package, parsed: for seconds, so not when tests are collected."""
    return house.read_package(PACKAGE)


RANKS = {
    "errors": 0,
    "version": 0,
    "common": 1,
    "durable": 2,
    "config": 3,
    "data": 4,
    "models": 4,
    "adapters": 5,
    "kernels": 6,
    "engine": 7,
    "prepare": 8,
    "runs": 8,
    "evaluation": 8,
    "deploy": 9,
    "plan": 9,
    "tracking": 9,
    "training": 10,
    "watch": 11,
    "api": 12,
    "verify": 12,
    "cli": 13,
}
"""A module imports only from folders of smaller rank (and from its own)."""
LIMITS = {"lines above 120 characters": 0, "`Any` per 1,000 lines": 8}
ONE_SUBJECT = {"config/schema.py"}
"""Files that may be long: every key of a run stands on one page."""
LAZY_IMPORTS = {
    "cli": "`llmtune --help` and every config error answer without torch",
    "* wandb": "optional package",
    "* mlflow": "optional package",
    "* trackio": "optional package",
    "* tensorboard": "optional package",
    "* triton": "optional package",
    "* liger_kernel": "optional package, and it imports triton",
    "* deepspeed": "optional package",
    "engine/strategies.py llmtune": "what only the optional package DeepSpeed needs",
    "* torch": "light modules answer without torch",
    "* transformers": "takes seconds to import, and needs torch",
    "* peft": "takes seconds to import, bitsandbytes with it, and full tuning does without",
    "* datasets": "takes seconds to import; few runs read with it",
    "* pyarrow": "takes long to import; only parquet files need it",
    "* lm_eval": "optional package",
    "engine/choose_device.py resource": "does not exist on Windows",
    "durable/tensors.py numpy": "`llmtune runs` and config errors answer without it",
    "* huggingface_hub": "models are listed and tokenizers found without it",
    "models/score_head.py llmtune": "loads torch, without which models are listed",
    "models/gguf.py gguf": "loads NumPy, and most models are no such file",
    "models/gguf.py llmtune": "loads torch, without which tokenizers are found",
    "* tokenizers": "needed only where a tokenizer is trained",
    "watch/ui/answers.py llmtune": "the page shows runs without torch; only a chat loads a model",
}
"""Folder, file, `file package` or `* package` -> why its imports may stand inside functions."""
FENCES = {
    "typer": ("cli",),
    "rich.prompt": ("cli",),
    "rich": ("cli", "tracking", "watch"),
    "textual": ("watch",),
    "wandb": ("tracking",),
    "mlflow": ("tracking",),
    "trackio": ("tracking",),
    "tensorboard": ("tracking",),
    "torch.utils.tensorboard": ("tracking",),
    "yaml": ("config",),
    "peft": ("adapters",),
    "bitsandbytes": ("models", "engine"),
    "deepspeed": ("engine",),
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "os.system", "os.popen"}


def in_folders():
    """(rank's name, module) of every module but the package's own `__init__` and `__main__`."""
    for module in modules():
        name = module.path.split("/")[0].removesuffix(".py")
        if name not in {"__init__", "__main__"}:
            yield name, module


def imported(tree):
    """Every import of a module, wherever it stands, type-checking blocks excepted."""
    return [found for found in house.imports(tree) if not found.typing_only]


def dotted(node):
    """`a.b.c` of an attribute chain, or None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return None


def test_every_folder_has_a_rank():
    assert {folder for folder, _ in in_folders()} == set(RANKS)
    assert all(isinstance(rank, int) for rank in RANKS.values())


def test_what_is_imported_from_the_package_exists():
    """Also inside functions, and also for type checkers: seen without running any of it."""
    names = {module.name for module in modules()}
    wrong = [
        f"{module.path}:{found.line} imports {found.name}"
        for module in modules()
        for found in house.imports(module.tree)
        if found.name.startswith("llmtune.")
        and not names & {name := found.name.removeprefix("llmtune."), name.rpartition(".")[0]}
    ]
    assert wrong == []


def test_a_module_imports_only_from_folders_of_smaller_rank():
    wrong = []
    for folder, module in in_folders():
        for found in imported(module.tree):
            parts = found.name.split(".")
            if parts[0] != "llmtune" or len(parts) < 2 or parts[1] not in RANKS:
                continue
            if parts[1] != folder and RANKS[parts[1]] >= RANKS[folder]:
                wrong.append(f"{module.path}:{found.line} imports {found.name}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    """Also not through imports inside functions."""
    graph = house.import_graph(modules())
    assert sum(map(len, graph.values())) > 500
    assert house.circles(graph) == []


def test_a_circle_of_imports_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"g"}, "g": {"e", "a"}}
    assert house.circles(graph) == [["b", "c"], ["e", "f", "g"]]


def test_imports_inside_functions_are_only_those_with_a_reason():
    wrong, used = [], set()
    for folder, module in in_folders():
        for found in house.lazy_imports(module):
            package = found.name.split(".")[0]
            reasons = {folder, module.path, f"{module.path} {package}", f"* {package}"} & LAZY_IMPORTS.keys()
            used |= reasons
            if not reasons:
                wrong.append(f"{module.path}:{found.line} imports {found.name} inside a function")
    assert wrong == []
    assert used == LAZY_IMPORTS.keys(), "a reason for which there is no import"


def test_few_modules_lie_outside_of_folders():
    assert len(house.loose_modules(modules())) <= 3


def test_lines_and_types_stay_within_their_limits():
    long_lines = [place for length, place in house.line_lengths(modules()) if length > 120]
    assert len(long_lines) <= LIMITS["lines above 120 characters"], long_lines
    per_thousand = (
        1000 * sum(map(house.count_any, modules())) / sum(lines for lines, _ in house.file_lengths(modules()))
    )
    assert per_thousand <= LIMITS["`Any` per 1,000 lines"]


def test_numeric_functions_have_shapes_and_raising_ones_name_their_errors():
    public = list(house.public_functions(modules()))
    numeric, raising = ([function for function in public if getattr(function, kind)] for kind in ("numeric", "raises"))
    assert min(len(numeric), len(raising)) > 150
    assert [function.place for function in numeric if not function.shapes] == []
    assert [function.place for function in raising if not function.names_its_errors] == []


@pytest.mark.parametrize(
    ("docstring", "has_shapes", "names"),
    [
        ("Add.", False, False),
        ("Add; both [B, T]. Raises MachineError.", True, False),
        ("Add; both of shape [B, T]. Raises ConfigError.", True, True),
        ("Add. ConfigError for a negative one.", False, False),
    ],
)
def test_a_docstring_without_shapes_or_errors_is_found(docstring, has_shapes, names):
    text = f'def add(a: Tensor):\n    """{docstring}"""\n    raise ConfigError.all([])\n'
    (function,) = house.public_functions([house.Module("engine/add.py", text, ast.parse(text))])
    assert (function.numeric, function.raises) == (True, True)
    assert (function.shapes, function.names_its_errors) == (has_shapes, names)


def test_the_script_prints_the_figures():
    folder = PACKAGE / "common"  # the whole package takes six seconds
    command = [sys.executable, ROOT / "scripts" / "house", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [re.split(r"\s{2,}", line)[0] for line in done.stdout.splitlines()]
    assert names == [name for name, _ in house.figures(house.read_package(folder))]
    assert len(names) >= 15


WINGS = ("example", "reading", "rows", "rendering", "dataset")
"""The way of a row in `data/`: from files to records, conversations, tokens, data sets."""


def test_the_wings_of_data_import_only_from_those_before_them():
    wrong, seen = [], set()
    for folder, module in in_folders():
        wing = module.path.split("/")[1].removesuffix(".py") if folder == "data" else "__init__"
        if wing == "__init__":
            continue
        seen.add(wing)
        wrong += [
            f"{module.path}:{found.line} imports {found.name}"
            for found in imported(module.tree)
            if found.name.startswith("llmtune.data.") and WINGS.index(found.name.split(".")[2]) > WINGS.index(wing)
        ]
    assert wrong == []
    assert seen == set(WINGS)


def test_libraries_stay_behind_their_fences():
    wrong = []
    for folder, module in in_folders():
        for found in imported(module.tree):
            for library, folders in FENCES.items():
                if f"{found.name}.".startswith(f"{library}.") and folder not in folders:
                    wrong.append(
                        f"{module.path}:{found.line} imports {found.name}, which belongs to {', '.join(folders)}"
                    )
    assert wrong == []


def all_but_tests():
    """Everything of ours that is written in Python but the tests themselves, which show that canaries do fire."""
    helpers = [path for path in sorted((ROOT / "tests").rglob("*.py")) if not path.name.startswith("test_")]
    scripts = [
        path
        for path in sorted((ROOT / "scripts").iterdir())
        if path.is_file() and "python" in path.read_text().partition("\n")[0]
    ]
    found = {
        "package": sorted(PACKAGE.rglob("*.py")),
        "helpers": helpers,
        "scripts": scripts,
        "benchmarks": sorted((ROOT / "benchmarks").rglob("*.py")),
    }
    assert {name: len(paths) > 1 for name, paths in found.items()} == dict.fromkeys(found, True)
    return [path for paths in found.values() for path in paths]


def test_p4_nothing_unpickles_evaluates_or_goes_through_a_shell():
    parsed = {PACKAGE / module.path: module.tree for module in modules()}
    wrong, read = [], 0
    for path in all_but_tests():
        tree = parsed.get(path) or ast.parse(path.read_text(encoding="utf-8"))
        read += 1
        place = path.relative_to(ROOT)
        wrong += [
            f"{place}:{found.line} imports {found.name}"
            for found in imported(tree)
            if found.name.split(".")[0] in FORBIDDEN_MODULES
        ]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func) or ""
            words = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            if name in FORBIDDEN_CALLS or words.get("shell") is True or words.get("allow_pickle") is True:
                wrong.append(f"{place}:{node.lineno} calls {name}")
    assert wrong == []
    assert read > 50


def test_only_the_durable_folder_renames_or_deletes():
    wrong = []
    calls = {
        "os.rename",
        "os.replace",
        "os.unlink",
        "os.remove",
        "os.rmdir",
        "shutil.rmtree",
        "shutil.move",
        "os.link",
        "os.symlink",
        "os.fsync",
    }
    for folder, module in in_folders():
        if folder == "durable":
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and dotted(node.func) in calls:
                wrong.append(f"{module.path}:{node.lineno} calls {dotted(node.func)}")
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {"write_text", "write_bytes", "unlink", "rmdir"}
            ):
                base = dotted(node.func.value) or ""
                if base != "durable":
                    wrong.append(f"{module.path}:{node.lineno} calls .{node.func.attr} outside durable")
    assert wrong == []


def test_a_file_above_four_hundred_lines_or_a_function_above_sixty_has_a_second_name_in_it():
    def above(limit, lengths):
        return [place for length, place in lengths if length > limit and place not in ONE_SUBJECT]

    files, functions = house.file_lengths(modules()), house.function_lengths(modules())
    assert len(files) > 150
    assert (above(400, files), above(60, functions)) == ([], [])
    assert above(200, files)
    assert above(40, functions)


def test_light_modules_import_nothing_heavy():
    heavy = {"torch", "transformers", "datasets", "pyarrow", "peft", "wandb"}
    base = ("errors", "durable", "config.layers", "models.catalog", "models.tokenizer", "runs.folder", "cli.main")
    light = (*base, "watch.run_data", "watch.health", "watch.report.page", "watch.ui.server")
    code = f"import sys, {', '.join(f'llmtune.{name}' for name in light)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "llmtune.watch.ui.server" in loaded
    assert heavy & set(loaded) == set()
