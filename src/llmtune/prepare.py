"""Everything that comes before a model is loaded: tokenizer, rows, examples, packs and, exactly, the steps.

`data preview`, `data report`, `plan` and `--dry-run` stop here; training goes on from here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from llmtune.adapters.start import fit_start
from llmtune.common.decisions import Decision
from llmtune.config.document import DEFAULT, Origin
from llmtune.config.layers import ResolvedConfig
from llmtune.config.paths import config_folder_named
from llmtune.config.process_options import Options
from llmtune.config.schema import ArchitectureConfig, Config, DataConfig
from llmtune.data.dataset.batches import BatchPlan
from llmtune.data.dataset.labels import labels_of_rows
from llmtune.data.dataset.make_dataset import PreparedData, iter_texts, prepare_data
from llmtune.data.dataset.micro_batch import Layout
from llmtune.data.dataset.mixture import EpochDraws, plan_epochs
from llmtune.data.dataset.overlong import RAISE_LENGTH, overlong_ways
from llmtune.data.dataset.packing import Indices, examples_together, plan_sequences
from llmtune.data.dataset.planned_answers import PlannedAnswers
from llmtune.data.dataset.store import MappedExamples
from llmtune.data.example import ExampleSet, Side
from llmtune.data.rendering.renderer import Renderer
from llmtune.data.rows.preferences import RECOGNIZED_BY
from llmtune.engine.preference import for_comparison
from llmtune.errors import ConfigError, DataError, TokenizerError
from llmtune.models import catalog
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.hub import local_folder, may_ignore_auto_map
from llmtune.models.read_config import Context, context_of, read_config
from llmtune.models.save import other_prompts_of_base
from llmtune.models.scan import refuse_unsafe_folder
from llmtune.models.tokenizer import (
    LoadedTokenizer,
    load_tokenizer,
    load_tokenizer_folder,
    own_vocabulary,
    train_tokenizer_for,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "Prepared",
    "find_context",
    "find_model",
    "find_model_config",
    "fit_max_length",
    "fit_train_tokens",
    "keep_fitted",
    "open_renderer",
    "open_tokenizer",
    "overlong_named",
    "prepare",
]


@dataclass(frozen=True)
class Prepared:
    """A run before its model is loaded."""

    config: Config
    source: ModelSource
    tokenizer: LoadedTokenizer
    renderer: Renderer
    data: PreparedData
    packs: list[Indices]
    """Indices of the examples of each sequence (without packing: one each)."""
    draws: EpochDraws | None
    """What draws the examples of each epoch; None where every epoch has all packs."""
    tokenizer_is_new: bool
    """The tokenizer was trained on this run's rows, and lives in the run."""
    decisions: tuple[Decision, ...]
    """The choices made so far, with reasons."""
    labels: tuple[str, ...] = ()
    """Labels of the units of the head that is trained in the place of the one that predicts tokens."""

    @functools.cached_property
    def examples(self) -> ExampleSet:
        """What steps are made of: the training rows, or for prompts the longest answers that may be drawn to them."""
        return _examples_of(self.config, self.data.train)

    def batch_plan(
        self,
        *,
        layout: Layout = "padded",
        max_group_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        equal_counts: bool = False,
    ) -> BatchPlan:
        """The windows of the training; layout and groups change how a window is cut, never what is in it."""
        training = self.config.training
        assert isinstance(training.batch_size, int), "`auto` is resolved before windows are planned"
        return BatchPlan(
            self.examples,
            self.packs,
            batch_size=training.batch_size,
            accumulation=training.gradient_accumulation_steps,
            epochs=training.epochs,
            max_steps=training.max_steps,
            shuffle_seed=self.config.data.shuffle_seed,
            world_size=world_size,
            rank=rank,
            layout=layout,
            max_group_tokens=max_group_tokens,
            pad_id=self.tokenizer.tokenizer.pad_token_id or 0,
            draws=self.draws,
            together=examples_together(self.examples),
            equal_counts=equal_counts,
        )


def find_model(config: Config, options: Options) -> ModelSource:
    """Resolve `model.name` to its files on this machine or on the hub. Raises ModelError."""
    return catalog.resolve(config.model.name, config.model.revision, offline=options.offline)


MadeOnce: TypeAlias = Callable[[Callable[[], LoadedTokenizer]], LoadedTokenizer]
"""Calls what trains a tokenizer in one process of a run, and gives it to all of them."""


def trains_tokenizer(config: Config, source: ModelSource) -> bool:
    """Whether the run's tokenizer is made from its own rows: a from-scratch model with no tokenizer named."""
    return source.kind == "scratch" and config.model.tokenizer is None


def open_tokenizer(
    config: Config,
    source: ModelSource,
    options: Options,
    *,
    folder: Path | None = None,
    made_once: MadeOnce = lambda train: train(),
) -> LoadedTokenizer:
    """Load the run's tokenizer: from `folder` where it is given, else the model's or the one named in the config.

    From scratch with none named, it is trained on the run's rows, by way of `made_once`.
    """
    if folder is not None:
        return load_tokenizer_folder(folder)
    if trains_tokenizer(config, source):
        texts = iter_texts(config.data, RECOGNIZED_BY[config.objective.method])
        return made_once(lambda: train_tokenizer_for(source, config.model, texts))
    return load_tokenizer(
        source, config.model, trust_remote_code=options.trust_remote_code, new_tokens=config.adapter.train_tokens
    )


def open_renderer(config: Config, loaded: LoadedTokenizer) -> Renderer:
    """The renderer that turns this config's conversations into ids and weights."""
    return Renderer.of_config(loaded.tokenizer, config.data)


def find_model_config(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedConfig | None:
    """Return the config of the model of `source` before it is loaded; None for a model that is built from scratch.

    Of a hub model only small files are fetched. Raises ModelError for files that are unsafe or unreadable, MachineError
    where the hub cannot be reached.
    """
    if source.kind == "scratch":
        return None
    folder = local_folder(source, weights=False, code=trust_remote_code)
    refuse_unsafe_folder(folder, trust_remote_code=trust_remote_code, ignore_auto_map=may_ignore_auto_map(source))
    return read_config(folder, trust_remote_code=trust_remote_code)


def find_context(
    source: ModelSource, model_config: PreTrainedConfig | None, architecture: ArchitectureConfig
) -> Context | None:
    """Return the context of the model of `source`; None where its config names none.

    model_config: see `find_model_config`. architecture: `model.architecture`, for a model built from scratch.
    """
    if model_config is not None:
        return context_of(model_config)
    entry = source.entry
    assert entry is not None
    assert entry.shape is not None
    row = ArchitectureConfig(**entry.architecture)  # type: ignore[arg-type]
    tokens = architecture.max_seq_len or row.max_seq_len or entry.shape.max_seq_len
    return Context(tokens, ends=(architecture.positions or row.positions) == "learned")


def fit_train_tokens(
    config: Config, source: ModelSource, model_config: PreTrainedConfig | None, loaded: LoadedTokenizer
) -> tuple[Config, list[Decision]]:
    """Return the config whose `adapter.train_tokens` has every token that is new to the model, and that choice.

    New are tokens without a row in the model's embedding, and, where `model.tokenizer` names another tokenizer, tokens
    that the model's own does not have in that place. Left frozen, their rows would stay untrained, and would be no part
    of the adapter. Raises TokenizerError for a tokenizer that is another model's, where the embedding stays frozen.
    """
    if model_config is None or config.adapter.start_from is not None:  # an adapter to start from has its own rows
        return config, []
    rows = int(model_config.get_text_config().vocab_size)
    vocabulary = loaded.tokenizer.get_vocab()
    own = own_vocabulary(source) if config.model.tokenizer is not None else None
    new = {token for token, index in vocabulary.items() if index >= rows}
    kept = 1 - len(new) / len(vocabulary)
    if own is not None:
        new |= {token for token, index in vocabulary.items() if own.get(token) != index}
        kept = sum(vocabulary.get(token) == index for token, index in own.items()) / len(own)
    # A few moved ids are new tokens; most of them moved is another vocabulary, which rows cannot mend.
    if kept < 0.5:
        return config, [_other_tokenizer(config, kept)]
    added = sorted(new - set(config.adapter.train_tokens), key=vocabulary.__getitem__)
    if not added or config.adapter.method == "none":
        return config, []
    train_tokens = (*config.adapter.train_tokens, *added)
    shown = ", ".join(train_tokens[:8]) + (f" and {len(train_tokens) - 8:,} more" if len(train_tokens) > 8 else "")
    reason = f"new to the model are {len(added):,} of the tokenizer's tokens; their rows are trained and saved"
    fitted = replace(config, adapter=replace(config.adapter, train_tokens=train_tokens))
    return fitted, [Decision("adapter.train_tokens", shown, reason)]


def _other_tokenizer(config: Config, kept: float) -> Decision:
    """Return the choice to train with another model's tokenizer; TokenizerError where nothing can learn its ids."""
    problem = f"this is another model's tokenizer: {kept:.1%} of the model's tokens keep their id"
    names = (config.adapter.target_modules, *config.adapter.modules_to_save)
    if config.adapter.method != "none" and not any("embed" in str(name) or "wte" in str(name) for name in names):
        fix = (
            "leave model.tokenizer out; or train the embedding too: adapter.modules_to_save=[embed_tokens,lm_head] or "
            "adapter.method=none"
        )
        raise TokenizerError(f"{problem}, and the embedding is frozen", where="model.tokenizer", fix=fix)
    return Decision("model.tokenizer", config.model.tokenizer or "the model's own", f"{problem}; all must be learned")


def fit_max_length(
    config: Config, context: Context | None, origins: Mapping[str, Origin]
) -> tuple[Config, list[Decision]]:
    """Return the config with `data.max_length` within the model's context where it was not given, and that choice.

    A given length above it is named where positions are rotary, because such a model computes longer rows. Raises
    ConfigError where the model's positions end there.
    """
    given, origin = config.data.max_length, origins.get("data.max_length", DEFAULT)
    if context is None or given <= context.tokens:
        return config, []
    if origin.kind == "default":
        fitted = replace(config, data=replace(config.data, max_length=context.tokens))
        return fitted, [Decision("data.max_length", context.tokens, "the longest sequence this model sees, in tokens")]
    if not context.ends:
        reason = f"more than the {context.tokens:,} tokens this model was made for; longer rows mean little to it"
        return config, [Decision("data.max_length", given, reason)]
    raise _too_long_for_model(f"`data.max_length: {given}` is more", config, context, origin.where)


def _too_long_for_model(problem: str, config: Config, context: Context, where: str) -> ConfigError:
    sides: dict[str, Side | None] = {"sft": None, "grpo": "prompt"}
    ways = overlong_ways(sides.get(config.objective.method, "chosen"))
    fix = f"set data.max_length={context.tokens}, and data.overlong to {ways}"
    return ConfigError(
        f"{problem} than the {context.tokens:,} tokens this model sees: it has no position for a later one",
        where=where,
        fix=fix,
    )


@contextmanager
def overlong_named(decisions: Sequence[Decision]) -> Iterator[None]:
    """Let the errors for over-long rows name a length that was chosen here, as one of `decisions`, and not by the user.

    Raises the DataError that the block raises.
    """
    try:
        yield
    except DataError as error:
        reason = next((decision.reason for decision in decisions if decision.key == "data.max_length"), None)
        if reason is None:
            raise
        named = f" (the length is {reason})"
        raise DataError.all(
            problem._replace(fix=problem.fix.removeprefix(RAISE_LENGTH) + named)
            if problem.fix is not None and problem.fix.startswith(RAISE_LENGTH)
            else problem
            for problem in error.problems
        ) from error


def keep_fitted(config: Config, fitted: Config) -> Config:
    """Return `config` with the values that `prepare` fitted to the model, as they are in `fitted`."""
    return replace(
        config,
        data=replace(config.data, max_length=fitted.data.max_length),
        adapter=fitted.adapter,
        model=replace(
            config.model,
            name=fitted.model.name,
            revision=fitted.model.revision,
            tokenizer=fitted.model.tokenizer,
            quantization=fitted.model.quantization,
        ),
    )


def prepare(
    resolved: ResolvedConfig,
    options: Options,
    *,
    tokenizer_folder: Path | None = None,
    made_once: MadeOnce = lambda train: train(),
    is_stopped: bool = False,
    progress: Callable[[int, int | None, float], None] | None = None,
) -> Prepared:
    """Do everything that needs no model: find it, open its tokenizer, turn rows into examples, lay them into packs.

    What the config leaves open is fitted to the model (`fit_max_length`, `fit_train_tokens`) and to the adapter it
    starts from (`fit_start`), unless the run is a stopped one: then its values stand. `made_once` lets one of several
    processes train a tokenizer. `progress(done, total, rows_per_second)` is called while rows are tokenized. Raises
    ConfigError, ModelError, TokenizerError or DataError.
    """
    config, still = resolved.config, list[Decision]()
    if config.objective.method != "sft":
        config, still = for_comparison(config)
    if not config.data.train:
        raise ConfigError("no training data is named", where="data.train", fix="name a file: `data.train=rows.jsonl`")
    with config_folder_named(resolved):
        fitted: list[Decision] = []
        if config.adapter.start_from is not None and not is_stopped:
            config, fitted = fit_start(config, resolved.origins)
        source = find_model(config, options)
        loaded = open_tokenizer(config, source, options, folder=tokenizer_folder, made_once=made_once)
        renderer = open_renderer(config, loaded)
        model_config = find_model_config(source, trust_remote_code=options.trust_remote_code)
        context = find_context(source, model_config, config.model.architecture)
        if not is_stopped:
            config, length = fit_max_length(config, context, resolved.origins)
            config, tokens = fit_train_tokens(config, source, model_config, loaded)
            fitted += [*length, *tokens, *other_prompts_of_base(config)]
        with overlong_named(fitted):
            data = prepare_data(
                config.data, renderer, formats=RECOGNIZED_BY[config.objective.method], progress=progress
            )
    examples = _examples_of(config, data.train)
    sets = [examples, *([_examples_of(config, data.eval)] if data.eval is not None else [])]
    fitted += _beyond_context(config, context, sets)
    packs, draws = _lay_out(examples, data.train, config.data)
    labels: tuple[str, ...] = ()
    if config.objective.method != "sft":
        labels, said = labels_of_rows(config, data)
        still += said
    decisions = (*source.decisions, *loaded.decisions, *still, *fitted, *renderer.decisions, *data.decisions)
    new = trains_tokenizer(config, source)
    return Prepared(config, source, loaded, renderer, data, packs, draws, new, decisions, labels)


def _examples_of(config: Config, rows: ExampleSet) -> ExampleSet:
    objective = config.objective
    if objective.method != "grpo":
        return rows
    return PlannedAnswers(rows, objective.num_generations, objective.max_new_tokens)


def _beyond_context(config: Config, context: Context | None, sets: Sequence[ExampleSet]) -> list[Decision]:
    """Name answers that may be drawn beyond rotary positions, which `fit_max_length` cannot know of.

    Raises ConfigError for an example that is longer than the table of the model's positions.
    """
    longest = max(int(max(examples.lengths, default=0)) for examples in sets)
    if context is None or longest <= context.tokens:
        return []
    draws, answer = config.objective.method == "grpo", config.objective.max_new_tokens
    if not draws:
        if context.ends:
            raise _too_long_for_model(f"a row of {longest:,} tokens is longer", config, context, "data.max_length")
        return []  # `data.max_length` is named
    told = f"with a prompt of {longest - answer:,} tokens more than the {context.tokens:,} tokens"
    if not context.ends:
        reason = f"{told} this model was made for; what is drawn beyond them means little to it"
        return [Decision("objective.max_new_tokens", answer, reason)]
    free, left = context.tokens - (longest - answer), context.tokens - answer
    fixes = [f"set objective.max_new_tokens={free}"] if free > 0 else []
    fixes += [f"leave long prompts out: data.max_length={left} and data.overlong=drop"] if left > 1 else []
    raise ConfigError(
        f"`objective.max_new_tokens: {answer}` is {told} this model sees: it has no position for a later one",
        where="objective.max_new_tokens",
        fix=", or ".join(fixes) or "shorten both, or use a model with a longer context",
    )


def _lay_out(examples: ExampleSet, rows: MappedExamples, data: DataConfig) -> tuple[list[Indices], EpochDraws | None]:
    """The packs, and what draws the examples of each epoch where sources have a share or are repeated."""
    if isinstance(examples, PlannedAnswers):
        return examples.packs(), None
    if data.is_mixed:
        return plan_epochs(rows, data)
    return plan_sequences(examples, data.max_length, data.packing, data.shuffle_seed), None
