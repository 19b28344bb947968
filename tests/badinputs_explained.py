"""What `llmtune explain` shows of the corpus of bad inputs: some cases of each kind with the answer they really get.

The answers stand in `src/llmtune/cli/explained.json`; each is compared with the real one whenever its case is tried. To
write them anew: `WRITE_EXPLAINED=1 pytest tests/test_badinputs.py -p no:xdist`, after deleting the file.
"""

import json
import re
from pathlib import Path

import badinputs_runner as runner

FILE = Path(__file__).parent.parent / "src" / "llmtune" / "cli" / "explained.json"
KINDS = {
    "commands": "usage", "configs": "config", "data": "data", "models": "model", "tokenizers": "tokenizer", "templates": "tokenizer",  # noqa: E501
    "adapters": "adapter", "checkpoints": "checkpoint",
}  # fmt: skip
"""Table -> the kind of error its cases end in; a case of exit code 6 is the machine's, whatever its table."""
SHOWN = 6
"""Cases shown of each kind."""
CODES = {"usage": 2, "config": 2, "data": 3, "model": 4, "tokenizer": 4, "adapter": 4, "checkpoint": 5, "machine": 6}


def kind_of(case):
    """The kind of error a case ends in; None where that is another than its table's."""
    kind = "machine" if case.code == 6 else KINDS.get(case.kind)
    return kind if kind is not None and CODES[kind] == case.code else None


def chosen():
    """The cases the file shows; without a file, of each kind `SHOWN` cases spread over all of it that run in this
    process.
    """
    shown = {one["id"] for one in entries()}
    if shown:
        return [case for case in runner.cases() if case.id in shown]
    found = []
    for kind in dict.fromkeys(CODES):
        fitting = [
            case for case in runner.cases() if kind_of(case) == kind and not case.child and len(case.command) < 120
        ]
        found += (
            [fitting[number * len(fitting) // SHOWN] for number in range(SHOWN)] if len(fitting) > SHOWN else fitting
        )
    return found


def entry(case, outcome, here, places):
    """A case as it is shown: its command and its answer, with this machine's places as words."""
    names = {str(here): "FOLDER", **{str(place): name.upper() for name, place in places.items()}}
    text = outcome.err[outcome.err.index("error: ") :].strip()
    for place in sorted(names, key=len, reverse=True):
        text = text.replace(place, names[place])
    command = re.sub(r"\{(\w+)\}", lambda found: "FOLDER" if found[1] == "here" else found[1].upper(), case.command)
    return {"kind": kind_of(case), "id": case.id, "command": f"llmtune {command}", "answer": text}


def entries():
    """What `llmtune explain` shows now."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else []


def write(shown):
    """Put one entry into the file, in the place of an older one of its case."""
    others = [one for one in entries() if one["id"] != shown["id"]]
    order = [case.id for case in CHOSEN]
    made = sorted([*others, shown], key=lambda one: order.index(one["id"]) if one["id"] in order else len(order))
    FILE.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


CHOSEN = chosen()
