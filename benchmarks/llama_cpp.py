"""Run an exported GGUF file in llama.cpp and compare its tokens with those of its source in plain transformers.

    llmtune export MODEL --output model.gguf
    python benchmarks/llama_cpp.py FOLDER model.gguf [--server-python PYTHON] [--tokens 48]

FOLDER: the model as plain transformers loads it. PYTHON: an interpreter that has `xllamacpp`, a package that carries
llama.cpp's server (https://pypi.org/project/xllamacpp/); this one when not given. Compared
are token ids, greedy tokens and their log-probabilities. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import urllib.request
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
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 512, 1, False
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


def main() -> int:
    """Start the server, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--server-python", default=sys.executable)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    command = [options.server_python, "-c", SERVER, str(options.file)]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        line = next((line for line in server.stdout if line.startswith("address")), None)
        if line is None:
            raise SystemExit("llama.cpp does not load the file")
        address = line.split()[1]
        wrong = compare_ids(address, tokenizer)
        differences, largest, compared = compare_tokens(address, model, tokenizer, options.tokens)
    finally:
        server.terminate()
    wrong += differences
    counts = f"{len(HOSTILE_TEXTS)} texts as ids, {compared} greedy tokens"
    print(f"{counts}; largest difference of a log-probability {largest:.2e}")
    print("\n".join(wrong) or "all the same")
    return 1 if wrong or largest > TOLERANCE else 0


if __name__ == "__main__":
    raise SystemExit(main())
