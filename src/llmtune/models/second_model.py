"""The second model of `objective.reference: model`: found, and its tokens compared with those of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.config.schema import ObjectiveConfig
from llmtune.errors import ModelError, TokenizerError
from llmtune.models.catalog import resolve
from llmtune.models.catalog_entry import ModelSource
from llmtune.models.tokenizer import own_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["find_second_model"]


def find_second_model(
    objective: ObjectiveConfig, tokenizer: PreTrainedTokenizerBase, *, offline: bool = False
) -> ModelSource | None:
    """Find the model that answers are compared with; None where the config names none.

    Every token of the run must have the same id there: other ids are other words. Raises ModelError where there is no
    such model, TokenizerError for one with other ids.
    """
    if objective.reference_model is None:
        return None
    where = "objective.reference_model"
    source = resolve(objective.reference_model, objective.reference_revision, offline=offline)
    if source.kind == "scratch":
        fix = "name a trained model: a folder or a hub id"
        raise ModelError(f"`{source.name}` is built from scratch, and knows nothing", where=where, fix=fix)
    fix = "name a model of the same family, or leave objective.reference and objective.reference_model out"
    own = own_vocabulary(source)
    if own is None:
        raise TokenizerError(f"`{source.name}` has no tokenizer to compare with that of the run", where=where, fix=fix)
    for token, index in tokenizer.get_vocab().items():
        if own.get(token) != index:
            there = f"the id {own[token]}" if token in own else "no id"
            raise TokenizerError(f"the token `{token}` has the id {index} in this run and {there} there", where, fix)
    return source
