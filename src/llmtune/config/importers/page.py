"""docs/switching.md from the tables: `python -m llmtune.config.importers.page > docs/switching.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from llmtune.config.importers.python_calls import CODE
from llmtune.config.importers.tables import Peer, Row, own_table, peer_names

__all__ = ["page"]

INTRODUCTION = """\
# Switching from another toolkit

The command `config import` reads the config of another toolkit and writes one of llmtune. Nothing of the file is run.

```bash
llmtune config import lora.yml --output here.yaml
llmtune config validate here.yaml
```

- The toolkit is found by the keys of the file, and said. `--from` names it.
- Each line of the result has its origin in a comment.
- The toolkit's own defaults are written out, because an import without them trains something else.
- The report says of every key what became of it: kept, computed, dropped because, did nothing in the other toolkit
  either, needs you, no equivalent.
- Exit code 0: nothing is without an equivalent. Exit code 3: something is, and the report says what that changes.
- Where another toolkit's file is given to `config validate` or `train`, they say whose it looks like, and this command.

It reads YAML, JSON, command lines in a shell script or a page (`--number` takes another than the first), and the
keywords of a training script or a notebook. `--json` prints the config and the report as data.

In the tables of defaults, `lora` and `full` are what is trained, `has:KEY` and `no:KEY` whether a key is given. The
tables are those that the import reads.

A step of llmtune has `batch_size` x `gradient_accumulation_steps` rows, however many devices share it. Most toolkits
multiply that by the number of devices. Where the file names the devices, the import does so too; where it does not,
multiply by hand. GRPO of TRL, which most of them use, counts drawn answers where llmtune counts prompts: the import
divides by the answers to each prompt.
"""

SHARED = {"_transformers": "Keys of transformers", "_grpo": "Keys of TRL's GRPO"}
"""Tables that others include, and their headings."""
ENDINGS = {"ms-swift": "sh", "unsloth": "py"}
"""Toolkits whose settings stand in no YAML file."""


def page() -> str:
    """Return the page as Markdown: one section for each toolkit."""
    peers = sorted((own_table(name) for name in peer_names()), key=lambda peer: peer.name.lower())
    sections = [_section(peer) for peer in peers]
    sections += [_shared(name, heading) for name, heading in SHARED.items()]
    return INTRODUCTION + "".join("\n" + "\n".join(section) + "\n" for section in sections)


def _section(peer: Peer) -> Iterator[str]:
    yield f"## Coming from {peer.name}"
    yield ""
    yield f"```bash\nllmtune config import {peer.id}.{ENDINGS.get(peer.id, 'yaml')} --from {peer.id}\n```"
    yield ""
    yield f"Its keys: <{peer.url}>."
    yield ""
    yield f"What {peer.name} does where a file says nothing; of several that fit, the first:"
    yield ""
    yield from _defaults(peer)
    yield from _keys(peer)
    for name, prefix in peer.includes:
        below = f", below `{prefix}`" if prefix else ""
        heading = SHARED[name]
        yield ""
        yield f"It also reads the [{heading[0].lower()}{heading[1:]}](#{_anchor(heading)}){below}."


def _shared(name: str, heading: str) -> Iterator[str]:
    yield f"## {heading}"
    yield ""
    yield "Several toolkits read these."
    table = own_table(name)
    if table.defaults:
        yield ""
        yield from _defaults(table)
    yield from _keys(table)


def _defaults(peer: Peer) -> Iterator[str]:
    yield "| key here | value | when | from |"
    yield "| --- | --- | --- | --- |"
    for default in peer.defaults:
        cells = (f"`{default.key}`", f"`{default.value}`", f"`{default.when}`" if default.when else "", default.text)
        yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _anchor(heading: str) -> str:
    return heading.lower().replace("'", "").replace(" ", "-")


def _keys(peer: Peer) -> Iterator[str]:
    rows = [row for row in (*peer.rows.values(), *(row for _, row in peer.patterns)) if not row.key.startswith("$")]
    yield ""
    yield f"Keys that have a key here ({sum(_has_key(row) for row in rows)}):"
    yield ""
    yield "| key there | key here | |"
    yield "| --- | --- | --- |"
    for row in rows:
        if _has_key(row):
            yield f"| `{_cell(row.key)}` | `{_target(row)}` | {_cell(_how(row))} |"
    for heading, rule in (
        ("Without an equivalent, unless they are off", "none"),
        ("In your hands", "needs"),
    ):
        by_text: dict[str, list[str]] = {}
        for row in rows:
            if row.rule == rule:
                by_text.setdefault(row.text, []).append(f"`{row.key}`")
        if by_text:
            yield ""
            yield f"{heading}:"
            yield ""
            for text, keys in by_text.items():
                yield f"- {', '.join(keys)}" + (f": {text}" if text else "")


def _has_key(row: Row) -> bool:
    return bool(row.argument) and row.rule not in ("none", "needs", "drop", "ignored", "alias", "each-of")


def _target(row: Row) -> str:
    return row.argument.rpartition(" ")[2]


def _how(row: Row) -> str:
    """The words or the arithmetic of a row, shortened."""
    if row.rule in ("compute", "of-pretraining"):
        return f"`{row.text}`"
    if row.rule == "positive" and row.text:
        return f"0 or less: {row.text}"
    if row.rule in ("words", "component", "holds", "adam"):
        words = [part.partition("=")[::2] for part in row.text.split("; ")]
        kept = dict.fromkeys(
            f"`{word.removeprefix(CODE) or 'nothing'}`"
            for word, value in words
            if word != "*" and value and not value.startswith(("!", "?"))
        )
        takes_any = ("*", "") in words
        return f"values: {', '.join([*kept][:12])}" + ", ..." * (takes_any or len(kept) > 12) if kept else ""
    return row.text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
