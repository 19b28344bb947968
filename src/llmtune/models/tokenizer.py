"""Load a tokenizer with everything training needs: a chat template, a pad token, and a digest to know it by."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.common.decisions import Decision
from llmtune.config.schema import ModelConfig
from llmtune.errors import MachineError, ModelError, Problem, TokenizerError
from llmtune.models.catalog import resolve
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.chat_templates import find_chat_template
from llmtune.models.hub import local_folder, may_ignore_auto_map
from llmtune.models.read_config import garbage_collection_paused, read_fast_tokenizer
from llmtune.models.scan import refuse_unsafe_folder
from llmtune.models.tokenizer_training import train_tokenizer

__all__ = [
    "LoadedTokenizer",
    "load_tokenizer",
    "load_tokenizer_folder",
    "tokenizer_digest",
    "train_tokenizer",
    "train_tokenizer_for",
]

_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|endoftext|>")
"""Tokens that other models reserve for padding, the most telling first."""

_NEEDED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
"""Control tokens a shipped template writes; without them in the vocabulary they would be spelled out in pieces."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """A fast tokenizer, what was chosen for it, and the sha256 over its vocabulary, rules, special tokens and chat
    template.
    """

    tokenizer: Any
    digest: str
    decisions: tuple[Decision, ...] = ()


@garbage_collection_paused()
def load_tokenizer(
    source: ModelSource, model_config: ModelConfig, *, trust_remote_code: bool = False, new_tokens: Sequence[str] = ()
) -> LoadedTokenizer:
    """Load the tokenizer that `model.tokenizer` names, or the model's own.

    new_tokens are added as special tokens where the vocabulary lacks them (`adapter.train_tokens`). Raises
    TokenizerError when there is none, when it is not a fast tokenizer, or when the chat template cannot be used with
    it.
    """
    folder, where, ignore_auto_map = _tokenizer_folder(source, model_config, trust_remote_code)
    refuse_unsafe_folder(folder, trust_remote_code=trust_remote_code, ignore_auto_map=ignore_auto_map)
    tokenizer = _read(folder, where, trust_remote_code=trust_remote_code)
    decisions: list[Decision] = []
    missing = [one for one in dict.fromkeys(new_tokens) if one not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
        decisions.append(Decision("adapter.train_tokens", ", ".join(missing), "not in the vocabulary, so added to it"))
    decisions += _choose_template(tokenizer, source, model_config)
    decisions += _choose_pad(tokenizer)
    tokenizer.clean_up_tokenization_spaces = False  # decoding must give the text back, not a prettier one (Q6)
    return LoadedTokenizer(tokenizer, tokenizer_digest(tokenizer), tuple(decisions))


@garbage_collection_paused()
def load_tokenizer_folder(folder: Path) -> LoadedTokenizer:
    """Load a tokenizer that was saved with a run, a checkpoint or a model, as it is there: nothing is chosen again but
    a missing pad token.

    So it has the chat template that was trained with. Raises TokenizerError.
    """
    refuse_unsafe_folder(folder)
    tokenizer = _read(folder, str(folder), trust_remote_code=False)
    decisions = _choose_pad(tokenizer)
    tokenizer.clean_up_tokenization_spaces = False
    return LoadedTokenizer(tokenizer, tokenizer_digest(tokenizer), tuple(decisions))


def train_tokenizer_for(source: ModelSource, model_config: ModelConfig, texts: Iterable[str]) -> LoadedTokenizer:
    """Train the tokenizer of a from-scratch model on the run's own texts, with the vocabulary its shape asks for.

    Raises ConfigError for a vocabulary too small, TokenizerError when there is no text or the chat template cannot be
    used.
    """
    assert source.entry is not None
    assert source.entry.shape is not None
    architecture = model_config.architecture
    wanted = architecture.vocab_size or source.entry.shape.vocab_size
    context = architecture.max_seq_len or source.entry.shape.max_seq_len
    tokenizer = train_tokenizer(texts, wanted, chat_template=None, max_length=context)
    tokenizer.chat_template = find_chat_template(model_config.chat_template or "chatml")
    why = f"`{source.name}` is built from scratch and no tokenizer is named: byte-level BPE trained on this run's rows"
    decision = Decision("model.tokenizer", f"{len(tokenizer):,} of {wanted:,} entries", why)
    return LoadedTokenizer(tokenizer, tokenizer_digest(tokenizer), (decision,))


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over what decides ids: vocabulary, merges, normalisation, special tokens, chat template.

    Not padding, not truncation.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("padding", None)
    rules.pop("truncation", None)
    special = {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())}
    whole = json.dumps([rules, special, tokenizer.chat_template], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(whole.encode("ascii")).hexdigest()


def _tokenizer_folder(
    source: ModelSource, model_config: ModelConfig, trust_remote_code: bool
) -> tuple[Path, str, bool]:
    """(folder, what named it, whether its auto_map is known to be unneeded)."""
    if model_config.tokenizer is not None:
        own = Path(model_config.tokenizer).expanduser()
        if own.is_file() and own.suffix == ".json":
            own = own.parent
        if own.is_dir():
            return own, "model.tokenizer", False
        if own.is_file() and own.suffix.lower() != ".gguf":
            problem = f"`{model_config.tokenizer}` is a file, and neither a tokenizer.json nor a .gguf file"
            raise TokenizerError(problem, where="model.tokenizer", fix="name the folder that holds tokenizer.json")
        with _blaming("model.tokenizer"):
            source = resolve(model_config.tokenizer, offline=source.offline)
    if source.kind == "scratch":
        raise TokenizerError(
            f"`{source.name}` is built from scratch and has no tokenizer of its own",
            where="model.tokenizer",
            fix="name a tokenizer folder, or make one: `llmtune tokenizer train --config CONFIG --output FOLDER`",
        )
    where = "model.name" if model_config.tokenizer is None else "model.tokenizer"
    with _blaming(where):
        return local_folder(source, weights=False, code=trust_remote_code), where, may_ignore_auto_map(source)


@contextlib.contextmanager
def _blaming(key: str) -> Iterator[None]:
    """Let an error say that the value of `key` is wrong where it says so of model.name."""
    try:
        yield
    except (ModelError, MachineError) as error:
        problems = [
            Problem(
                one.problem,
                key if one.where == "model.name" else one.where,
                one.fix and one.fix.replace("model.name", key),
            )
            for one in error.problems
        ]
        raise type(error).all(problems) from error


def _read(folder: Path, where: str, *, trust_remote_code: bool) -> Any:
    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise TokenizerError(
            f"`{folder}` holds no tokenizer", where=where, fix="name a tokenizer folder in model.tokenizer"
        )
    tokenizer = read_fast_tokenizer(folder, where, trust_remote_code=trust_remote_code)
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise TokenizerError(
            f"the chat template of the tokenizer in {folder} is not text",
            where=str(folder / "tokenizer_config.json"),
            fix="take `chat_template` out of it, and give one with model.chat_template=FILE",
        )
    return tokenizer


def _choose_template(tokenizer: Any, source: ModelSource, model_config: ModelConfig) -> list[Decision]:
    wanted = model_config.chat_template
    if wanted is not None:
        tokenizer.chat_template = find_chat_template(wanted)
        missing = [one for one in _NEEDED_TOKENS.get(wanted, ()) if one not in tokenizer.get_vocab()]
        if missing:
            raise TokenizerError(
                f"the chat template `{wanted}` writes {' and '.join(missing)}, and this tokenizer has no such token",
                where="model.chat_template",
                fix=f"add them: 'adapter.train_tokens=[{','.join(missing)}]', or use model.chat_template=turns, which needs none",
            )
        return []
    if isinstance(tokenizer.chat_template, dict):
        named = tokenizer.chat_template
        if {"default", "tool_use"} <= named.keys():
            tokenizer.chat_template = {name: named[name] for name in ("default", "tool_use")}
            return [
                Decision(
                    "model.chat_template",
                    "default, and tool_use for rows with tools",
                    f"the tokenizer has {', '.join(sorted(named))}",
                )
            ]
        choice = "default" if "default" in named else min(named)
        tokenizer.chat_template = named[choice]
        return [Decision("model.chat_template", choice, f"the tokenizer has {len(named)}: {', '.join(sorted(named))}")]
    if tokenizer.chat_template:
        return []
    own = source.entry.chat_template if source.entry else None
    choice = own or ("chatml" if all(one in tokenizer.get_vocab() for one in _NEEDED_TOKENS["chatml"]) else "turns")
    if choice == "turns" and tokenizer.eos_token is None:
        return []  # text can still be trained on; a conversation will be refused by name
    tokenizer.chat_template = find_chat_template(choice)
    return [Decision("model.chat_template", choice, "the tokenizer has none; used for conversations only")]


def _choose_pad(tokenizer: Any) -> list[Decision]:
    """Padding never carries loss here (masks go by position), so any token does.

    One that means nothing else is kindest to other tools.
    """
    if tokenizer.pad_token is not None:
        return []
    vocabulary = tokenizer.get_vocab()
    choice = next((one for one in _PAD_NAMES if one in vocabulary), None) or tokenizer.unk_token or tokenizer.eos_token
    if choice is None:
        choice = tokenizer.convert_ids_to_tokens(0)
    tokenizer.pad_token = choice
    return [
        Decision(
            "pad token", choice, "the tokenizer names none; padding is masked by position, so this changes no loss"
        )
    ]
