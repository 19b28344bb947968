"""Load a tokenizer with everything training needs: a chat template, a pad token and a digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.common.decisions import Decision
from llmtune.common.environment import home_expanded
from llmtune.config.schema import ModelConfig
from llmtune.errors import MachineError, ModelError, Problem, TokenizerError
from llmtune.models.catalog import resolve
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.chat_templates import find_chat_template
from llmtune.models.hub import local_folder, may_ignore_auto_map
from llmtune.models.read_config import garbage_collection_paused, read_fast_tokenizer
from llmtune.models.scan import refuse_unsafe_folder
from llmtune.models.tokenizer_training import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "LoadedTokenizer",
    "load_tokenizer",
    "load_tokenizer_folder",
    "own_vocabulary",
    "tokenizer_digest",
    "train_tokenizer_for",
]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|endoftext|>")
"""Tokens that published models reserve for padding, the least ambiguous first."""

_REQUIRED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
"""Control tokens a shipped template writes; a vocabulary without them would spell them out in pieces."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """A fast tokenizer with its digest and the choices made for it."""

    tokenizer: PreTrainedTokenizerFast
    digest: str
    """See `tokenizer_digest`."""
    decisions: tuple[Decision, ...] = ()


@garbage_collection_paused()
def load_tokenizer(
    source: ModelSource, model_config: ModelConfig, *, trust_remote_code: bool = False, new_tokens: Sequence[str] = ()
) -> LoadedTokenizer:
    """Load the tokenizer that `model.tokenizer` names, or the model's own.

    new_tokens: added as special tokens where the vocabulary lacks them (`adapter.train_tokens`).

    Raises TokenizerError when there is no tokenizer, when it has no fast form, or when the chat template or a token of
    the config does not fit it; ModelError or MachineError when the model it belongs to cannot be found or fetched.
    """
    folder, where, ignore_auto_map = _tokenizer_folder(source, model_config, trust_remote_code)
    refuse_unsafe_folder(folder, trust_remote_code=trust_remote_code, ignore_auto_map=ignore_auto_map)
    tokenizer = _read_tokenizer(folder, where, trust_remote_code=trust_remote_code)
    decisions: list[Decision] = []
    missing = [token for token in dict.fromkeys(new_tokens) if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
        decisions.append(Decision("adapter.train_tokens", ", ".join(missing), "not in the vocabulary, so added to it"))
    _set_tokens(tokenizer, model_config)
    decisions += _choose_template(tokenizer, source, model_config)
    decisions += _choose_pad(tokenizer)
    tokenizer.clean_up_tokenization_spaces = False  # decoding must give the text back, not a prettier one (Q6)
    return LoadedTokenizer(tokenizer, tokenizer_digest(tokenizer), tuple(decisions))


@garbage_collection_paused()
def load_tokenizer_folder(folder: Path) -> LoadedTokenizer:
    """Load the tokenizer saved in a run, a checkpoint or a model, with the chat template that was trained with.

    Only a missing pad token is chosen. Raises TokenizerError when it cannot be read, ModelError for unsafe files.
    """
    refuse_unsafe_folder(folder)
    tokenizer = _read_tokenizer(folder, str(folder), trust_remote_code=False)
    decisions = _choose_pad(tokenizer)
    tokenizer.clean_up_tokenization_spaces = False
    return LoadedTokenizer(tokenizer, tokenizer_digest(tokenizer), tuple(decisions))


@garbage_collection_paused()
def own_vocabulary(source: ModelSource) -> dict[str, int] | None:
    """Return the ids of the tokens that the model itself was trained with; None where it has no readable tokenizer."""
    try:
        folder = local_folder(source, weights=False)
        refuse_unsafe_folder(folder, ignore_auto_map=may_ignore_auto_map(source))
        return _read_tokenizer(folder, str(folder), trust_remote_code=False).get_vocab()
    except (TokenizerError, ModelError):
        return None  # only then is another one needed: nothing can be compared


def train_tokenizer_for(source: ModelSource, model_config: ModelConfig, texts: Iterable[str]) -> LoadedTokenizer:
    """Train the tokenizer of a from-scratch model on the run's own texts, with the vocabulary size of its shape.

    Raises ConfigError for a vocabulary too small, TokenizerError without text or for an unusable chat template.
    """
    assert source.entry is not None
    assert source.entry.shape is not None
    architecture = model_config.architecture
    vocab_size = architecture.vocab_size or source.entry.shape.vocab_size
    context = architecture.max_seq_len or source.entry.shape.max_seq_len
    tokenizer = train_tokenizer(texts, vocab_size, chat_template=None, max_length=context)
    tokenizer.chat_template = find_chat_template(model_config.chat_template or "chatml")
    reason = (
        f"`{source.name}` is built from scratch and no tokenizer is named: byte-level BPE trained on this run's rows"
    )
    _set_tokens(tokenizer, model_config)
    decision = Decision("model.tokenizer", f"{len(tokenizer):,} of {vocab_size:,} entries", reason)
    return LoadedTokenizer(tokenizer, tokenizer_digest(tokenizer), (decision,))


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 over everything that decides ids: vocabulary, merges, normalizer, special tokens, template.

    Settings of padding and truncation are left out, because every call sets them anew.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("padding", None)
    rules.pop("truncation", None)
    special = {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())}
    # Sorted and in ASCII, so that the same rules give the same bytes in every version of Python.
    content = json.dumps([rules, special, tokenizer.chat_template], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()


def _tokenizer_folder(
    source: ModelSource, model_config: ModelConfig, trust_remote_code: bool
) -> tuple[Path, str, bool]:
    """Return (folder, config key that named it, whether its auto_map is known to be unneeded)."""
    if model_config.tokenizer is not None:
        path = home_expanded(model_config.tokenizer)
        if path.is_file() and path.suffix == ".json":
            path = path.parent
        if path.is_dir():
            return path, "model.tokenizer", False
        if path.is_file() and path.suffix.lower() != ".gguf":
            problem = f"`{model_config.tokenizer}` is a file, and neither a tokenizer.json nor a .gguf file"
            raise TokenizerError(problem, where="model.tokenizer", fix="name the folder that holds tokenizer.json")
        with _errors_name("model.tokenizer"):
            source = resolve(model_config.tokenizer, offline=source.offline)
    if source.kind == "scratch":
        raise TokenizerError(
            f"`{source.name}` is built from scratch and has no tokenizer of its own",
            where="model.tokenizer",
            fix="name a tokenizer folder, or make one: `llmtune tokenizer train --config CONFIG --output FOLDER`",
        )
    key = "model.name" if model_config.tokenizer is None else "model.tokenizer"
    with _errors_name(key):
        return local_folder(source, weights=False, code=trust_remote_code), key, may_ignore_auto_map(source)


@contextlib.contextmanager
def _errors_name(key: str) -> Iterator[None]:
    """Replace model.name by `key` in the problems of an error: resolving and fetching assume model.name."""
    try:
        yield
    except (ModelError, MachineError) as error:
        problems = [
            Problem(
                problem.problem,
                key if problem.where == "model.name" else problem.where,
                problem.fix and problem.fix.replace("model.name", key),
            )
            for problem in error.problems
        ]
        raise type(error).all(problems) from error


def _read_tokenizer(folder: Path, where: str, *, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
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


def _choose_template(
    tokenizer: PreTrainedTokenizerFast, source: ModelSource, model_config: ModelConfig
) -> list[Decision]:
    requested = model_config.chat_template
    if requested is not None:
        tokenizer.chat_template = find_chat_template(requested)
        # Spelled out in pieces, `<|im_end|>` would be text that a model learns to write, and never a stop.
        missing = [token for token in _REQUIRED_TOKENS.get(requested, ()) if token not in tokenizer.get_vocab()]
        if missing:
            add = f"'adapter.train_tokens=[{','.join(missing)}]'"
            raise TokenizerError(
                f"the chat template `{requested}` writes {' and '.join(missing)}, and this tokenizer has no such token",
                where="model.chat_template",
                fix=f"add them: {add}, or use model.chat_template=turns, which needs none",
            )
        return []
    if isinstance(tokenizer.chat_template, dict):
        return [_choose_named_template(tokenizer, tokenizer.chat_template)]
    if tokenizer.chat_template:
        return []
    vocabulary = tokenizer.get_vocab()
    has_chatml = all(token in vocabulary for token in _REQUIRED_TOKENS["chatml"])
    published = source.entry.chat_template if source.entry else None
    choice = published or ("chatml" if has_chatml else "turns")
    # Without an end token nothing could end a turn of that template.
    if choice == "turns" and tokenizer.eos_token is None:
        return []  # text can still be trained on; a conversation will be refused by name
    tokenizer.chat_template = find_chat_template(choice)
    return [Decision("model.chat_template", choice, "the tokenizer has none; used for conversations only")]


def _choose_named_template(tokenizer: PreTrainedTokenizerFast, templates: dict[str, str]) -> Decision:
    """Choose among several templates: `default` and `tool_use` together, else `default`, else the first by name."""
    names = ", ".join(sorted(templates))
    if {"default", "tool_use"} <= templates.keys():
        tokenizer.chat_template = {name: templates[name] for name in ("default", "tool_use")}
        return Decision(
            "model.chat_template", "default, and tool_use for rows with tools", f"the tokenizer has {names}"
        )
    choice = "default" if "default" in templates else min(templates)
    tokenizer.chat_template = templates[choice]
    return Decision("model.chat_template", choice, f"the tokenizer has {len(templates)}: {names}")


def _set_tokens(tokenizer: PreTrainedTokenizerFast, model_config: ModelConfig) -> None:
    """Set the pad and end token that the config names. Raises TokenizerError for one that the vocabulary lacks."""
    vocabulary = tokenizer.get_vocab()
    problems = []
    for key in ("pad_token", "eos_token"):
        token = getattr(model_config, key)
        if token is None:
            continue
        if token not in vocabulary:
            near = get_close_matches(token, [name for name in vocabulary if len(name) > 2], n=2)
            hint = f"did you mean {' or '.join(f'`{name}`' for name in near)}? " if near else ""
            fix = f"{hint}a new token is added with 'adapter.train_tokens=[{token}]'"
            problems.append(Problem(f"the tokenizer has no token `{token}`", f"model.{key}", fix))
        else:
            setattr(tokenizer, key, token)
    if problems:
        raise TokenizerError.all(problems)


def _choose_pad(tokenizer: PreTrainedTokenizerFast) -> list[Decision]:
    """Set a missing pad token; returns the choice."""
    if tokenizer.pad_token is not None:
        return []
    # Masks go by position, so any token would do; one without another meaning keeps other tools from masking text.
    vocabulary = tokenizer.get_vocab()
    named = next((token for token in _PAD_NAMES if token in vocabulary), None)
    choice = named or tokenizer.unk_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.pad_token = choice
    reason = "the tokenizer names none; padding is masked by position, so this changes no loss"
    return [Decision("pad token", choice, reason)]
