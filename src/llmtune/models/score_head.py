"""The head of a model that gives scores: one number for each unit, read at the end of a row.

It is transformers' sequence classification: the decoder of a causal language model, and a linear layer (`score`) in the
place of the output head. It reads the last token that is not the padding token, as the library does in every batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmtune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["REWARD", "as_scoring", "labels_of", "zero_new_head"]

REWARD = ("reward",)
"""Labels of a model whose one unit is a score."""


def as_scoring(config: PreTrainedConfig, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Make a causal model's config that of a model with a unit for each of `labels`, at least one.

    Raises ModelError for an architecture of which transformers has none, and for one that has other labels already.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        problem = f"transformers has no sequence classification for `{config.model_type}`"
        raise ModelError(problem, where=where, fix="name a model of another architecture: llama, qwen, gemma, gpt2")
    own = labels_of(config.to_dict())
    if own and own != tuple(labels) and len(own) == len(labels) and not {*own}.issubset({*_generic(len(own)), *REWARD}):
        problem = f"the model has the labels {', '.join(own[:8])}, and the rows have {', '.join(labels[:8])}"
        raise ModelError(problem, where=where, fix="name the labels alike, or begin with the model it was tuned from")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    if len(labels) > 1:
        config.problem_type = "single_label_classification"
    # By it the library finds the last token of a padded row.
    config.get_text_config().pad_token_id = config.pad_token_id = tokenizer.pad_token_id


def labels_of(config: object) -> tuple[str, ...]:
    """Return the labels of the model of a config.json; none where it is no sequence classification.

    The file may hold anything: what is wrong with it is said where the model is read.

    >>> labels_of({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}})
    ('no', 'yes')
    """
    architectures = config.get("architectures") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(architectures, list | tuple):
        return ()
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return ()
    names, count = config.get("id2label"), config.get("num_labels")
    if not isinstance(names, Mapping) or not all(str(key).isdecimal() for key in names):
        names = {}
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    ordered = ordered or _generic(count if isinstance(count, int) and count > 0 else 2)
    return ordered if len(ordered) > 1 else REWARD


def _generic(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{index}" for index in range(count))


def zero_new_head(model: PreTrainedModel) -> None:
    """Set the head to 0.

    All scores are then 0 and the loss is exactly log 2 (log L with L labels); what the head learns comes from the rows
    alone, and no adapter has to undo a random direction.
    """
    from llmtune.models.parameters import find_score_head  # loads torch, without which models are listed

    head = find_score_head(model)
    assert head is not None
    for parameter in head.parameters():
        parameter.data.zero_()
