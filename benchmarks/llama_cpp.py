"""Run an exported GGUF file in llama.cpp and compare its tokens with those of its source in plain transformers.

    llmtune export MODEL --output model.gguf
    python benchmarks/llama_cpp.py FOLDER model.gguf [--server-python PYTHON] [--tokens 48] [--answers ROWS.jsonl]
    python benchmarks/llama_cpp.py --families [--server-python PYTHON]

FOLDER: the model as plain transformers loads it. PYTHON: an interpreter that has `xllamacpp`, a package that carries
llama.cpp's server (https://pypi.org/project/xllamacpp/); this one when not given. Compared are token ids, greedy tokens
and their log-probabilities. `--answers`: the model answers the last question of each row as a chat; compared are the
ids of its prompt, and its answer with the row's own. `--families`: a tiny random model of each family and of
each kind of SentencePiece tokenizer that agrees on every text, exported, and its log-probabilities of every token. Exit
code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.deploy.gguf_vocabulary import HOSTILE_TEXTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = ("Why does bread rise?", "The capital of France is", "def add(a, b):\n    return", "1, 2, 3, 4,")
TOLERANCE = 2e-2
"""Largest difference of a log-probability: llama.cpp keeps keys and values in 16 bits, and sums in another order."""

SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], int(sys.argv[2]), 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print("address", server.listening_address, flush=True)
sys.stdin.read()
"""


def post(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a request to the server and return its answer."""
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        values: dict[str, Any] = json.load(answer)
    return values


def compare_ids(address: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that llama.cpp turns into other ids."""
    wrong = []
    for text in HOSTILE_TEXTS:
        ids = post(address, "tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        if ids != tokenizer.encode(text, add_special_tokens=False):
            wrong.append(f"{text!r} has other ids in llama.cpp")
    return wrong


def compare_tokens(
    address: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int
) -> tuple[list[str], float, int]:
    """Compare greedy continuations of `count` tokens.

    Returns the differences, the largest difference of a chosen token's log-probability, and the tokens compared.
    """
    import torch

    wrong, largest, compared = [], 0.0, 0
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        request = {
            "prompt": ids,
            "n_predict": count,
            "temperature": 0,
            "return_tokens": True,
            "n_probs": 1,
            "ignore_eos": True,
        }
        answer = post(address, "completion", request)
        tokens = answer["tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
        special_ids = {tokenizer.eos_token_id, *tokenizer.all_special_ids} - {None}
        logits[:, list(special_ids)] = -torch.inf  # `ignore_eos` forbids them in llama.cpp
        pairs = zip(logits, tokens, answer["completion_probabilities"], strict=True)
        for position, (row, token, probability) in enumerate(pairs):
            top = int(row.argmax())
            if top != token and float(row[top] - row[token]) > TOLERANCE:
                wrong.append(f"{prompt!r}, token {position}: {token} in llama.cpp, {top} in transformers")
                break
            largest = max(largest, abs(float(row[token]) - float(probability["logprob"])))
            compared += 1
    return wrong, largest, compared


def compare_answers(address: str, tokenizer: PreTrainedTokenizerBase, rows: Path) -> tuple[list[str], int, int]:
    """Ask the last question of each row as a chat.

    Returns the prompts with other ids, the answers that are the row's own, and the answers.
    """
    wrong, right, count = [], 0, 0
    for line in rows.read_text(encoding="utf-8").splitlines():
        *messages, answer = json.loads(line)["messages"]
        prompt = post(address, "apply-template", {"messages": messages})["prompt"]
        ids = post(address, "tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
        if ids != tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]:
            wrong.append(f"{messages[-1]['content']!r} has another prompt in llama.cpp")
        request = {"messages": messages, "temperature": 0, "max_tokens": 120}
        given = post(address, "v1/chat/completions", request)["choices"][0]["message"]["content"]
        right, count = right + (given.strip() == answer["content"].strip()), count + 1
    return wrong, right, count


def compare_families(python: str) -> int:
    """Export a tiny model of each family, and compare the log-probabilities of every token after a few prompts."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch
    from transformers import AutoModelForCausalLM

    from gguf_families import FAMILIES, WRITTEN_SPACES, sentencepiece_tokenizer, write_family
    from llmtune.deploy.export import export
    from llmtune.models.tokenizer_training import train_tokenizer

    texts = ["the user asks and the assistant answers", "12 and 345 are numbers"] * 4
    tries = [(name, train_tokenizer(texts, 280)) for name in FAMILIES]
    tries += [("llama", sentencepiece_tokenizer(texts, kind)) for kind in WRITTEN_SPACES]
    prompts = [torch.randint(4, 280, (count,)).tolist() for count in (1, 2, 9, 33, 100)]
    failed = 0
    for name, tokenizer in tries:
        # Drawn always: a piece of a character would be held back with its probabilities.
        seen = tokenizer.encode("a", add_special_tokens=False)[-1]
        with tempfile.TemporaryDirectory() as folder:
            base, file = write_family(name, Path(folder) / "base", tokenizer), Path(folder) / "model.gguf"
            export(str(base), file, gguf_type="f32")
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
            with llama_cpp(python, file, context=256) as address:
                wrong, largest = compare_ids(address, tokenizer), 0.0
                for ids in prompts:
                    request = {"prompt": ids, "n_predict": 1, "n_probs": len(tokenizer), "logit_bias": [[seen, 1000.0]]}
                    listed = post(address, "completion", request)["completion_probabilities"][0]["top_logprobs"]
                    with torch.no_grad():
                        expected = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
                    largest = max(largest, *(abs(float(expected[one["id"]]) - one["logprob"]) for one in listed))
        print(f"{name:14} {len(HOSTILE_TEXTS)} texts as ids, log-probabilities within {largest:.1e}", *wrong)
        failed += bool(wrong) or largest > TOLERANCE
    return 1 if failed else 0


@contextmanager
def llama_cpp(python: str, file: Path, *, context: int) -> Iterator[str]:
    """Run the server on a file; yield its address."""
    command = [python, "-c", SERVER, str(file), str(context)]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        line = next((line for line in server.stdout if line.startswith("address")), None)
        if line is None:
            raise SystemExit("llama.cpp does not load the file")
        yield line.split()[1]
    finally:
        server.terminate()


def main() -> int:
    """Start the server, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--server-python", default=sys.executable)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--families", action="store_true")
    options = parser.parse_args()
    if options.families:
        return compare_families(options.server_python)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    with llama_cpp(options.server_python, options.file, context=512) as address:
        wrong, largest = compare_ids(address, tokenizer), 0.0
        counts = f"{len(HOSTILE_TEXTS)} texts as ids"
        if options.answers is None:
            differences, largest, compared = compare_tokens(address, model, tokenizer, options.tokens)
            counts += f", {compared} greedy tokens; largest difference of a log-probability {largest:.2e}"
        else:
            differences, right, count = compare_answers(address, tokenizer, options.answers)
            counts += f", {count} prompts as ids; {right} of {count} answers are the rows' own"
        wrong += differences
    print(counts)
    print("\n".join(wrong) or "all the same")
    return 1 if wrong or largest > TOLERANCE else 0


if __name__ == "__main__":
    raise SystemExit(main())
