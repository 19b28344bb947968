"""Run folders for the tests of reports, written by hand, and a reader of their pages."""

import json
import math
from html.parser import HTMLParser

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[31m\u202e</pre><svg/onload=alert(3)>"
"""Text that would run or load something where it is not escaped."""


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_run(folder, losses, *, text="plain", rate=1e-3, heldout=()):
    """A finished run with these training losses from step 1 on and (step, loss) held out; `text` wherever rows are."""
    folder.mkdir(parents=True)
    metrics = [{"step": step, "eval_mean_nll": loss, f"eval_{text}_mean_nll": loss} for step, loss in heldout]
    for step, loss in enumerate(losses, 1):
        line = {"step": step, "train_mean_nll": loss, "grad_norm": 1.5 + step % 3, "learning_rate": rate}
        metrics.append({**line, "tokens_per_second": 900.0 + step % 7, "memory_bytes": 500_000_000, "num_tokens": 64})
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "samples.jsonl", [{"step": step, "prompt": text, "text": f"{step} {text}"} for step in (0, 9)])
    write_lines(folder / "events.jsonl", [{"step": 2, "kind": "spike", "level": "warning", "message": text}])
    write_lines(
        folder / "ledger.jsonl", [{"part": "train", "source": text, "fate": "bad", "reason": text, "tokens": 3}]
    )
    config = {
        "training": {"learning_rate": rate, "max_grad_norm": 1.0},
        "model": {"name": text},
        "data": {"system": text},
    }
    counts = {
        "input": 9,
        "used": 8,
        "cut": 0,
        "bad": 1,
        "tokens": 99,
        "loss_tokens": 9.0,
        "reasons": {"bad": {text: 1}},
    }
    plan = {
        "device": text,
        "steps": {"total_steps": len(losses)},
        "memory": {"peak_bytes": 4e8, "parts": {"weights": 3e8, text: 1e8}},
    }
    info = {"run_id": "0", "state": "finished", "name": folder.name, "notes": text, "tags": [text], "plan": plan}
    info |= {"identity": {"config": config, "versions": {"torch": text}}, "data": {"train": counts}}
    info |= {"decisions": [{"key": "model.name", "value": text, "reason": text}], "command": ["llmtune", text]}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "origins.json").write_text(json.dumps({"model.name": text}))
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    bins = [{"from": 0, "to": 9, "examples": 8}]
    example = {"source": text, "tokens": 3, "trained_tokens": 1, "stretches": [[text, 0.0, True], [text, 0.5, False]]}
    data = {"train": {"lengths": {"histogram": bins, "longest": 9}, "examples": [example]}}
    (folder / "data.json").write_text(json.dumps(data))
    return folder


def quiet_losses(count):
    """A loss that falls as those of real runs do, with some noise."""
    return [1.5 + 2.5 * math.exp(-step / (count / 4)) + 0.05 * math.sin(step * 12.9898) for step in range(count)]


class Page(HTMLParser):
    """Reads a page: its elements with their attributes, its text, and the data beside each chart."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.texts, self.charts, self._in = [], [], [], None
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self._in = (tag, dict(attributes))
        self.elements.append(self._in)

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in == ("script", {"type": "application/json"}):
            self.charts.append(json.loads(data))
        elif self._in is None or self._in[0] not in ("style", "script"):
            self.texts.append(data)

    def paths(self, kind):
        """The `d` of every path of a class such as `noisy`."""
        return [a["d"] for tag, a in self.elements if tag == "path" and kind in a.get("class", "").split()]
