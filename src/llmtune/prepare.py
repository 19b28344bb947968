"""Everything that comes before a model is loaded: tokenizer, rows, examples, packs and, exactly, the steps.

`data preview`, `data report`, `plan` and `--dry-run` stop here; training goes on from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmtune.common.decisions import Decision
from llmtune.config.layers import ResolvedConfig
from llmtune.config.paths import config_folder_named
from llmtune.config.process_options import Options
from llmtune.config.schema import Config
from llmtune.data.dataset.batches import BatchPlan
from llmtune.data.dataset.make_dataset import PreparedData, iter_texts, prepare_data
from llmtune.data.dataset.micro_batch import Layout
from llmtune.data.dataset.packing import Indices, plan_packs
from llmtune.data.rendering.renderer import Renderer
from llmtune.errors import ConfigError
from llmtune.models import catalog
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.tokenizer import LoadedTokenizer, load_tokenizer, load_tokenizer_folder, train_tokenizer_for

__all__ = ["Prepared", "find_model", "open_renderer", "open_tokenizer", "prepare"]


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
    tokenizer_is_new: bool
    """The tokenizer was trained on this run's rows, and lives in the run."""
    decisions: tuple[Decision, ...]
    """The choices made so far, with reasons."""

    def batch_plan(
        self, *, layout: Layout = "padded", max_group_tokens: int | None = None, rank: int = 0, world_size: int = 1
    ) -> BatchPlan:
        """The windows of the training; layout and groups change how a window is cut, never what is in it."""
        training = self.config.training
        assert isinstance(training.batch_size, int), "`auto` is resolved before windows are planned"
        return BatchPlan(
            self.data.train,
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
        )


def find_model(config: Config, options: Options) -> ModelSource:
    """Resolve `model.name` to its files on this machine or on the hub. Raises ModelError."""
    return catalog.resolve(config.model.name, config.model.revision, offline=options.offline)


def trains_tokenizer(config: Config, source: ModelSource) -> bool:
    """Whether the run's tokenizer is made from its own rows: a from-scratch model with no tokenizer named."""
    return source.kind == "scratch" and config.model.tokenizer is None


def open_tokenizer(
    config: Config, source: ModelSource, options: Options, *, folder: Path | None = None
) -> LoadedTokenizer:
    """Load the run's tokenizer: from `folder` where it is given, else the model's or the one named in the config.

    From scratch with none named, it is trained on the run's rows.
    """
    if folder is not None:
        return load_tokenizer_folder(folder)
    if trains_tokenizer(config, source):
        return train_tokenizer_for(source, config.model, _texts(config))
    return load_tokenizer(
        source, config.model, trust_remote_code=options.trust_remote_code, new_tokens=config.adapter.train_tokens
    )


def open_renderer(config: Config, loaded: LoadedTokenizer) -> Renderer:
    """The renderer that turns this config's conversations into ids and weights."""
    return Renderer(
        loaded.tokenizer, train_on=config.data.train_on, parse_control_tokens=config.data.parse_control_tokens
    )


def prepare(
    resolved: ResolvedConfig,
    options: Options,
    *,
    tokenizer_folder: Path | None = None,
    progress: Callable[[int, int | None, float], None] | None = None,
) -> Prepared:
    """Do everything that needs no model: find it, open its tokenizer, turn rows into examples, lay them into packs.

    `progress(done, total, rows_per_second)` is called while rows are tokenized. Raises ConfigError, ModelError,
    TokenizerError or DataError.
    """
    config = resolved.config
    if not config.data.train:
        raise ConfigError("no training data is named", where="data.train", fix="name a file: `data.train=rows.jsonl`")
    with config_folder_named(resolved):
        source = find_model(config, options)
        loaded = open_tokenizer(config, source, options, folder=tokenizer_folder)
        renderer = open_renderer(config, loaded)
        data = prepare_data(config.data, renderer, progress=progress)
    packs = plan_packs(data.train.lengths, config.data.max_length, config.data.packing, config.data.shuffle_seed or 0)
    decisions = (*source.decisions, *loaded.decisions, *renderer.decisions, *data.decisions)
    return Prepared(config, source, loaded, renderer, data, packs, trains_tokenizer(config, source), decisions)


def _texts(config: Config) -> Iterator[str]:
    return iter_texts(config.data)
