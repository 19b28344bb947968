"""What every test shares: no network, a cache of its own, and one tiny chat model."""

import gc
import importlib.util
import inspect
import ipaddress
import os
import re
import signal
import socket
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = (
    "1"  # sums then have one order, and a forked child finds no pool of threads that is not its own
)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from chat_templates import CHATML

for _number, _answer in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if (
        signal.getsignal(_number) == signal.SIG_IGN
    ):  # as under nohup or in the background of a script: children would inherit it
        signal.signal(_number, _answer)


LONG_FIRST = ("training", "runs", "verify", "examples", "tracking", "deploy", "gpu", "docs", "engine", "plan", "models")
"""Folders whose files take longest."""


def pytest_configure(config):
    """Hide a GPU from all tests but `-m gpu`: they train on the CPU, on every machine."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Long files first: then short ones are left for the end, and the workers end together."""
    here = Path(__file__).parent

    def place(item):
        folder = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        return LONG_FIRST.index(folder) if folder in LONG_FIRST else len(LONG_FIRST)

    items.sort(key=place)  # stable: the tests of a file stay together


def pytest_collection_finish():
    """Take what was imported out of the garbage collector's sight: a collection would look at a million objects."""
    import hypothesis  # noqa: F401 - when it is imported it asks who refers to an object, and no frozen one is named

    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # the ordinary one takes a twentieth of the suite's time


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Q9: a test that opens a connection to another machine fails."""
    connect = socket.socket.connect

    def only_here(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0]).is_loopback:
            raise AssertionError(f"a connection to {address} was opened")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Caches of the tests go to a folder of their own (unless one is named), shared by workers and child processes."""
    if "LLMTUNE_CACHE_DIR" not in os.environ:
        folder = tmp_path_factory.getbasetemp()
        shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
        os.environ["LLMTUNE_CACHE_DIR"] = str(shared / "cache")


@pytest.fixture
def mutant(tmp_path, request):
    """Build a broken copy of one of our modules: `mutant(module, before, after)` replaces a text that stands in it
    exactly once.
    """

    def build(module, before, after):
        source = inspect.getsource(module)
        assert source.count(before) == 1, f"{before!r} stands {source.count(before)} times in {module.__name__}"
        name = f"mutant_{len(sys.modules)}_{module.__name__.rpartition('.')[2]}"
        path = tmp_path / f"{name}.py"
        path.write_text(source.replace(before, after))
        spec = importlib.util.spec_from_file_location(name, path)
        broken = importlib.util.module_from_spec(spec)
        sys.modules[name] = broken
        request.addfinalizer(lambda: sys.modules.pop(name))
        spec.loader.exec_module(broken)
        return broken

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 400 entries with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the user asks and the assistant answers: a small system of words and numbers 0123456789"] * 3, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tiny_tokenizer):
    """A folder with a random Llama of 2 layers x 32 and the tiny tokenizer; read only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
